"""Is the rate too large or too small? The critical learning rate of the steps that were really taken."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer

from downslope.gradients.critical_learning_rate import critical_learning_rate
from downslope.gradients.vectors import flat
from downslope.logs.tensorboard import Measurement, step_writer
from downslope.runs.result import Result
from downslope.steps.due import check_count
from downslope.steps.loss import BatchLoss, Loss, check_loss, said_off, why_no_loss_of_a_step
from downslope.steps.observer import Observer
from downslope.steps.optimizer_steps import OptimizerStep

log = logging.getLogger(__name__)

TAGS = ("learning_rate_effect/critical", "learning_rate_effect/critical_ratio")
MEASURED = Measurement(TAGS, lambda row: row)


class CriticalLearningRate(Observer):
    """Measures η_c, from where on a step along its real direction no longer lowers the loss of its batch, and η/η_c.

    Above η_c a step goes uphill, whatever the optimizer, clipping and weight decay made of the gradient
    (`downslope.gradients.critical_learning_rate`). It takes up to 12 forwards on the batch of the step, with its random
    numbers, and needs leave to compute the loss again: a method `loss(batch)` of the module, or `loss=`. Of several
    parameter groups η is the first one's rate.

    Args:
        steps: Optimizer steps, counted from 0, that are measured in the beginning.
        every_n_steps: After the last of them; a measurement of 8 forwards is then a three-hundredth of the time. Not by
            the clock: what was measured decides the verdict, and the same seed is to have the same one.
        loss: As for `downslope.steps.loss.BatchLoss`.

    Attributes:
        least: The least η_c that was seen; None before the first.
        measured: Step, η_c and η of each measurement of this fit.
    """

    def __init__(
        self, steps: Sequence[int] = (0, 8, 32, 128, 512), every_n_steps: int = 1024, loss: Loss | None = None
    ) -> None:
        check_loss(loss)
        for step in steps:
            check_count("steps", step, least=0)
        check_count("every_n_steps", every_n_steps)
        self.steps = tuple(sorted(steps))
        self.every_n_steps = every_n_steps
        self.loss = loss
        self.reset()

    def reset(self) -> None:
        self.least: float | None = None
        self.measured: list[tuple[int, float, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"least": self.least}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.least = state_dict["least"]

    def add_to(self, result: Result) -> None:
        """Fills in the least η_c."""
        result.critical_learning_rate = self.least

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self.listen_only()
        self._batch_loss: BatchLoss | None = None
        if said_off(trainer, TAGS[0], why_no_loss_of_a_step(trainer, module, self.loss)):
            return
        self._writer = step_writer(trainer)
        steps = self.follow(trainer, self._before, self._after, self._is_due)
        steps.on_next = lambda: self.listen("on_train_batch_start", when=steps.are_due())
        steps.on_next()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_loss = BatchLoss(pl_module, batch, self.loss, batch_idx)  # before its forward draws a number

    def _before(self, step: OptimizerStep) -> None:
        if self._batch_loss:
            self._start = [flat(step.parameters)]

    def _after(self, step: OptimizerStep) -> None:
        loss, self._batch_loss = self._batch_loss, None
        if loss:
            self._measure(step, loss)

    def _is_due(self, step: int) -> bool:
        is_late = step > max(self.steps, default=-1)
        return step in self.steps or (is_late and step % self.every_n_steps == 0)

    def _measure(self, step: OptimizerStep, loss: BatchLoss) -> None:
        if (rate := step.optimizer.param_groups[0].get("lr")) is None:
            raise ValueError("the optimizer has no learning rate")
        rate = float(rate)
        before = self._start.pop()
        change = flat(step.parameters).sub_(before)
        start, direction = (loss.pieces(step.parameters, vector) for vector in (before, change))
        critical = None
        with loss.measuring():
            along = loss.along(start, direction)
            try:
                critical = critical_learning_rate(lambda each: float(along(each / rate)), rate)
            except ValueError as reason:  # momentum's step, or Adam's, need not go downhill
                log.info("Step %d: %s", step.step, reason)
        if critical is not None and math.isfinite(critical):
            self.least = critical if self.least is None else min(self.least, critical)
            self.measured.append((step.step, critical, rate))
            self._writer.add(step.step, MEASURED, [critical, rate / critical])
