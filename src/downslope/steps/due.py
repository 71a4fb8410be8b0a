"""When an observer measures: how its setting is checked, and how it is asked."""


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuses a setting that is no whole number of at least `least`: `True` and 1.0 are none either.

    Example:
        >>> check_count("every_n_steps", 1.5)
        Traceback (most recent call last):
            ...
        ValueError: `every_n_steps` must be a whole number of at least 1, got 1.5.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def is_due(count: int, every_n_steps: int, num_first: int = 0) -> bool:
    """Tells whether a step that `count` others precede is one of the first so many, or of every n, which 0 is too."""
    return count < num_first or count % every_n_steps == 0
