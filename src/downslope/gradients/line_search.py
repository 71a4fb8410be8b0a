"""The loss along a direction where no formula gives it: looked for by evaluations alone."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

NUM_DOUBLINGS = 20  # each way: a factor of a million


@dataclass(frozen=True, eq=False)
class Profile:
    """A loss as a function of the step's length η ≥ 0.

    Attributes:
        loss: Maps η to the loss.
        best: The η of its first valley.
    """

    loss: Callable[[float], float]
    best: float

    def __call__(self, learning_rate: float) -> float:
        """Returns the loss after a step of η."""
        return self.loss(learning_rate)


def look_for_best(loss: Callable[[float], float], start: float) -> Profile:
    """Returns a loss with the η of its valley, from some eight evaluations where the start is of the right order.

    η is doubled or halved until both its neighbours ½η and 2η are no better; then follows the vertex of the parabola
    through the three, which is that of a quadratic loss, and of one more that is narrower. A loss that is not finite
    counts as infinitely high.

    Args:
        loss: Maps η ≥ 0 to the loss, the same for the same η.
        start: Where to begin, above 0.

    Raises:
        ValueError: It falls for no η within a factor of a million of the start, or is not finite at 0.

    Example:
        >>> round(look_for_best(lambda rate: (rate - 3.0) ** 2, 100.0).best, 9)
        3.0
    """
    loss = functools.cache(loss)

    def height(rate: float) -> float:
        value = loss(rate)
        return value if math.isfinite(value) else math.inf

    rate = start
    for _ in range(NUM_DOUBLINGS):
        if not height(2 * rate) < height(rate):
            break
        rate *= 2
    for _ in range(NUM_DOUBLINGS):
        if height(rate) < height(0.0) and height(rate) <= height(rate / 2):
            break
        rate /= 2
    if not height(rate) < height(0.0):
        raise ValueError("no step along its gradient lowers the loss of the batch: it is flat to within rounding")
    for factor in (2.0, 1.25):  # the second, narrower parabola is for losses that are none
        vertex = _vertex(height, rate / factor, rate, rate * factor)
        if height(vertex) < height(rate):
            rate = vertex
    return Profile(loss, rate)


def _vertex(height: Callable[[float], float], left: float, middle: float, right: float) -> float:
    """Returns where the parabola through three points is least; the middle if that is not between them."""
    fall, rise = height(left) - height(middle), height(right) - height(middle)
    bend = (middle - left) * rise + (right - middle) * fall
    if not 0 < bend < math.inf:
        return middle
    vertex = middle - ((middle - left) ** 2 * rise - (right - middle) ** 2 * fall) / (2 * bend)
    return vertex if left < vertex < right else middle
