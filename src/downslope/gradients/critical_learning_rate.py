"""The critical learning rate: from where on a step, along its real direction, no longer lowers the loss."""

import math
from collections.abc import Callable

MAX_EVALUATIONS = 12
PRECISION = 1.03  # two guesses in a row that agree so well are believed
FARTHEST = 1e-6  # of the rate in use: what falls below that alone falls by chance
ROUNDING = 1e-6  # of the loss, some units of float32: smaller changes tell nothing

Points = list[tuple[float, float]]


def critical_learning_rate(loss: Callable[[float], float], learning_rate: float) -> float:
    """Returns η_c = min {η > 0 : L(θ − ηd) ≥ L(θ)}, for the direction d = −Δθ/η of a step that an optimizer took.

    It serves any optimizer, with clipping, weight decay and momentum, since the direction is the step's own: above η_c
    the step goes uphill. On a quadratic loss η_c = 2 g·d / d'Hd, which for plain gradient descent is at least 2/λ.

    Looked for is the zero of the mean slope s(η) = (L(θ − ηd) − L(θ)) / η, a straight line from −g·d on a quadratic:
    first by factors of 4, 8, 16, … from the rate in use until s changes its sign, or sooner where the line through
    the points says so; then in turn by that line and by the geometric middle.

    Args:
        loss: Maps η to L(θ − ηd), on the same batch and with the same random state each time; a mean or a sum. It is
            called at most 12 times, the first time at 0. A loss that is not finite counts as higher.
        learning_rate: η, where the search begins.

    Returns:
        η_c, as good as the loss is a quadratic within the last bracket; infinite where the loss still falls at the
        longest step that was tried.

    Raises:
        ValueError: η is not above 0, L(θ) is not finite, no change is above rounding, or d is no descent direction, as
            that of Adam or of momentum need not be.

    Example:
        L = ½(θ₁² + 4θ₂²) at (1, 1) has g = (1, 4). Along g itself, g·d = 17 and d'Hd = 65; along its signs 5 and 5:

        >>> along_gradient = lambda rate: ((1 - rate) ** 2 + 4 * (1 - 4 * rate) ** 2) / 2
        >>> round(critical_learning_rate(along_gradient, learning_rate=0.001), 9), round(2 * 17 / 65, 9)
        (0.523076923, 0.523076923)
        >>> round(critical_learning_rate(lambda rate: 5 * (1 - rate) ** 2 / 2, learning_rate=100.0), 9)
        2.0

    Reference: Kalra et al. (2026), arXiv 2601.16979.
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"`learning_rate` must be a finite number greater than 0, got {learning_rate!r}.")
    start = loss(0.0)
    if not math.isfinite(start):
        raise _no_rate(f"the loss is {start} where the step begins")
    points: Points = []
    low, high, rate = 0.0, math.inf, learning_rate
    for turn in range(MAX_EVALUATIONS - 1):
        value = loss(rate)
        change = value - start if math.isfinite(value) else math.inf
        is_heard = abs(change) > ROUNDING * abs(start)
        rises = change > 0 if is_heard else high < math.inf or _falls(points)
        if change < math.inf and (is_heard or rises):
            points.append((rate, change / rate if is_heard else 0.0))
        low, high = (low, rate) if rises else (rate, high)
        if high < 2 * low and not _falls(points):
            low, high = 0.0, low  # it was rounding that hid whether it falls there
        if high < FARTHEST * learning_rate:
            break
        guess = _zero(points, low, high)
        if 0 < low < guess <= high < math.inf and 1 / PRECISION < guess / rate < PRECISION:
            break
        rate = _next(guess, low, high, turn)
    if not _falls(points) or high < FARTHEST * learning_rate:
        reason = f"no descent direction: the loss falls at no rate down to {high:.3g}"
        raise _no_rate("the loss changes by no more than rounding" if high == math.inf else f"the step has {reason}")
    return guess if low < guess <= high < math.inf else math.sqrt(low * high)


def _falls(points: Points) -> bool:
    return any(mean_slope < 0 for _, mean_slope in points)


def _zero(points: Points, low: float, high: float) -> float:
    """Where the line through the two points next to the bracket, or next to where it has to be, is 0."""
    below = sorted(point for point in points if point[0] <= low)[-2:]
    above = sorted(point for point in points if point[0] >= high)[:2]
    nearest = [below[-1], above[0]] if below and above else below + above
    if len(nearest) < 2 or nearest[0][1] == nearest[1][1]:
        return math.nan
    (one, first), (two, second) = nearest
    return one - first * (two - one) / (second - first)


def _next(guess: float, low: float, high: float, turn: int) -> float:
    factor = 2.0 ** (turn + 2)
    if high == math.inf:
        return min(max(guess, 2 * low), factor * low) if guess > 0 else factor * low
    if low == 0:
        return min(max(guess, high / factor**2), high / factor) if guess > 0 else high / factor
    return guess if low < guess <= high and turn % 2 else math.sqrt(low * high)


def _no_rate(reason: str) -> ValueError:
    return ValueError(f"Cannot find a critical learning rate. This is because {reason}.")
