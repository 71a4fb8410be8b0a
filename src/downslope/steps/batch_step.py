"""One step and the batch that it was taken on, kept until a picture of it is wanted."""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor

from downslope.gradients.line_search import Profile, look_for_best
from downslope.steps.loss_function import LossFunction
from downslope.steps.random_state import RandomState, random_state
from downslope.steps.replay import silent, why_no_replay
from downslope.steps.unclipped_gradients import clones


def why_no_batch_step(trainer: Trainer, module: LightningModule) -> str | None:
    """Returns why a step cannot be held against the loss of its batch, None where it can."""
    if trainer.accumulate_grad_batches > 1:
        return "gradients are accumulated: a step follows several batches, and not one"
    return why_no_replay(trainer, module)


@dataclass(eq=False)
class BatchStep:
    """Made before a batch's forward; `ends` after its step. Copies stay where the parameters are.

    Attributes:
        step: Optimizer steps taken before this one.
        module: Trains.
        batch: As `training_step` gets it.
    """

    step: int
    module: LightningModule
    batch: Any
    _after: dict[str, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._random_state = RandomState()
        self._before = self._places()

    def _places(self) -> dict[str, Tensor]:
        names, parameters = zip(*self.module.named_parameters(), strict=True)
        return dict(zip(names, clones([parameter.detach() for parameter in parameters]), strict=True))

    def ends(self) -> None:
        """Keeps where the first step of the batch led."""
        if self._after is None:
            self._after = self._places()

    def profile(self, trainer: Trainer) -> tuple[Profile, float]:
        """Returns the loss of the batch along its negative gradient −g, and the η that the step took.

        Every evaluation sees the random numbers of the batch's own forward, in the parameters' precision; it happens
        on copies, and training never learns of it. η = −Δᵀg/‖g‖²: the learning rate itself for plain gradient
        descent, and for others as far as the step Δ follows the gradient.

        Raises:
            ValueError: There is no loss, no gradient or no slope to follow.
        """
        assert self._after is not None
        with silent(trainer), random_state(self._random_state):
            function = LossFunction(self.module, self.batch)
            _, gradient = function.value_and_gradient(self._before)
        slope = sum(float(each.cpu().double().square().sum()) for each in gradient.values())
        if not 0 < slope < math.inf:
            raise ValueError("the gradient is zero" if slope == 0 else "the gradient is not finite")
        followed = sum(
            float(((self._before[name] - self._after[name]).cpu().double() * each.cpu()).sum())
            for name, each in gradient.items()
        )

        def loss(learning_rate: float) -> float:
            moved = {name: self._before[name] - learning_rate * each for name, each in gradient.items()}
            with silent(trainer):
                return float(function({**self._before, **moved}).detach())

        rate = followed / slope
        if not math.isfinite(rate):
            raise ValueError("the parameters are not finite")
        return look_for_best(loss, abs(rate) or 1.0), rate
