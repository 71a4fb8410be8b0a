"""The slope of a function of one number at 0, from its values alone, with an honest account of the error."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

STEPS = tuple(10.0**-exponent for exponent in range(1, 8))


@dataclass(frozen=True)
class Slope:
    """A slope as central differences see it.

    Attributes:
        value: The derivative at 0.
        uncertainty: How much the value changes with ten times, and with a tenth of, the step.
        kink: How far the slopes to the right and to the left of 0 stay apart; 0 where the function is smooth.
    """

    value: float
    uncertainty: float
    kink: float


def central_difference(function: Callable[[float], float], step: float) -> float:
    """Returns (f(h) − f(−h)) / 2h.

    Example:
        >>> central_difference(lambda x: 3 * x + x**2, step=0.5)
        3.0
    """
    return (function(step) - function(-step)) / (2 * step)


def measure_slope(function: Callable[[float], float], scale: float = 1.0) -> Slope:
    """Returns the central difference at the step where its value depends least on the step.

    Too large a step curves away from the tangent, or steps over a kink; too small a one drowns in rounding.
    No step suits every function: one that computes in float32 inside needs 1e-2, one with a kink nearby 1e-7.
    So steps from 1e-1 to 1e-7 are tried, and of three neighbours that agree best the middle one is taken.

    Args:
        function: f, evaluated 14 times and at 0.
        scale: The unit of the steps.

    Example:
        >>> slope = measure_slope(math.exp)
        >>> abs(slope.value - 1) < 1e-9, slope.uncertainty < 1e-8, slope.kink
        (True, True, 0.0)
        >>> measure_slope(abs)  # −1 to the left, 1 to the right
        Slope(value=0.0, uncertainty=0.0, kink=2.0)
    """
    steps = [step * scale for step in STEPS]
    center = function(0.0)
    sides = [(function(step), function(-step)) for step in steps]
    slopes = [(right - left) / (2 * step) for (right, left), step in zip(sides, steps, strict=True)]
    bends = [abs(right + left - 2 * center) / step for (right, left), step in zip(sides, steps, strict=True)]
    changes = [abs(first - second) for first, second in itertools.pairwise(slopes)]
    uncertainties = [max(pair) for pair in itertools.pairwise(changes)]
    best = min(range(len(uncertainties)), key=lambda index: _or_infinite(uncertainties[index]))
    bend, next_bend = bends[best + 1], bends[best + 2]
    # Where the function is smooth the two sides meet in proportion to the step: by a tenth, from one to the
    # next.
    is_kink = not next_bend <= 0.3 * bend
    return Slope(slopes[best + 1], _or_infinite(uncertainties[best]), bend if is_kink else 0.0)


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
