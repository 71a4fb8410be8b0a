"""One step and the batch that it was taken on, kept until a picture of it is wanted."""

import math

from torch import Tensor

from downslope.gradients.line_search import Profile, look_for_best
from downslope.gradients.vectors import real
from downslope.steps.loss import BatchLoss, Parameters


class BatchStep:
    """Made before a batch's forward; `ends` after its step. Copies stay where the parameters are.

    Args:
        step: Optimizer steps taken before this one.
        loss: Of the batch: its `measuring` is best entered once for all that is asked of the profile.
    """

    def __init__(self, step: int, loss: BatchLoss) -> None:
        self.step = step
        self.loss = loss
        self._before = loss.parameters
        self._after: Parameters | None = None

    def ends(self) -> None:
        """Keeps where the first step of the batch led."""
        if self._after is None:
            self._after = self.loss.parameters

    def profile(self) -> tuple[Profile, float]:
        """Returns the loss of the batch along its negative gradient −g, and the η that the step took.

        η = −Δᵀg/‖g‖²: the learning rate itself for plain gradient descent, and for others as far as the step Δ follows
        the gradient.

        Raises:
            ValueError: There is no loss, no gradient or no slope to follow.
        """
        assert self._after is not None
        _, gradient = self.loss.value_and_gradient(self._before)
        slope = sum(_product(each, each) for each in gradient.values())
        if not 0 < slope < math.inf:
            raise ValueError("the gradient is zero" if slope == 0 else "the gradient is not finite")
        rate = sum(_product(self._before[name] - self._after[name], each) for name, each in gradient.items()) / slope
        if not math.isfinite(rate):
            raise ValueError("the parameters are not finite")
        loss = self.loss.along(self._before, {name: -each for name, each in gradient.items()})
        return look_for_best(lambda learning_rate: float(loss(learning_rate)), abs(rate) or 1.0), rate


def _product(one: Tensor, other: Tensor) -> float:
    return float((real(one).cpu().double() * real(other).cpu()).sum())
