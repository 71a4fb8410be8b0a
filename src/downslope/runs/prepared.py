"""What the gate has made and checked is handed over to the one run of this process: nothing is made twice."""

from collections.abc import Callable
from typing import Any, TypeVar

Thing = TypeVar("Thing")
_kept: dict[str, Any] = {}


def keep(**things: Any) -> None:
    """Keeps things by name for the run that is about to begin, and forgets those of any other."""
    _kept.clear()
    _kept.update(things)


def take(name: str, make: Callable[[], Thing]) -> Thing:
    """Returns what is kept, once, or makes it: a sweep's job has no gate of its own."""
    kept: Thing = _kept.pop(name) if name in _kept else make()
    return kept
