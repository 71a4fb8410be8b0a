"""Mistakes by name: a hint says what was seen, and asks."""

from downslope.verdict.evidence import Evidence
from downslope.verdict.thresholds import Thresholds, Word


def hints(seen: Evidence, word: Word, limits: Thresholds) -> tuple[str, ...]:
    """Returns the mistakes that leave these traces."""
    found = []
    if seen.leftover_gradient:
        found.append("the last step's gradient is still in `.grad` when the next one comes: is zero_grad() missing?")
    if seen.without_gradient:
        found.append(f"no gradient reaches {listed(seen.without_gradient)}: detached, or not used by the loss?")
    if seen.zero_gradient and word != "converged":
        found.append(f"the gradient of {listed(seen.zero_gradient)} is exactly zero: dead units, or a constant loss?")
    if seen.frozen and seen.line is not None:
        found.append(f"{listed(seen.frozen)} is frozen, and the closed form is that of all weights: on purpose?")
    if seen.forgotten:
        found.append(f"no optimizer holds {listed(seen.forgotten)}: replaced after the optimizer was made?")
    if is_not_of_this_loss(seen, limits):
        found.append(
            f"the gradient is about {seen.gradient_excess:.2g} × that of the loss: a sum over batches, not their mean?"
        )
    return tuple(found)


def is_not_of_this_loss(seen: Evidence, limits: Thresholds) -> bool:
    """Tells whether the gradient is too long for the loss that is logged."""
    return (seen.gradient_excess or 0.0) > limits.gradient_excess and not seen.leftover_gradient


def listed(names: tuple[str, ...], num_shown: int = 3) -> str:
    """Returns the first names, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:num_shown])
    return shown if len(names) <= num_shown else f"{shown} and {len(names) - num_shown} more"
