"""The steps of a block once more, from where it began: to the bit, or not at all."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from downslope.steps.attributes import Attributes
from downslope.steps.loss import silent, why_no_loss_of_a_step
from downslope.steps.measured_step import MeasuredStep
from downslope.steps.optimizer_steps import each_batch_is_a_step, overrides
from downslope.steps.random_state import RandomState, own_generators, random_state

log = logging.getLogger(__name__)

# A module that has one of them does more in a step than what is done here.
OWN_WAYS = ("backward", "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad")


def can_replay(trainer: Trainer, module: LightningModule) -> bool:
    """Tells whether all that a step does is known: the loss, its gradient, the Trainer's clip, one optimizer."""
    return (
        each_batch_is_a_step(trainer, module)
        and why_no_loss_of_a_step(trainer, module, None) is None
        and not overrides(module, *OWN_WAYS)
    )


class Replay:
    """Takes the steps of a run again, by the module's `loss(batch)`, on the module itself.

    Whatever else has a say in a step (somebody's hook, random numbers that a data set draws, an operation that is not
    deterministic) shows in the losses: only where each is the same to the bit the steps are those of the run.

    Args:
        trainer: Has one optimizer; `can_replay` told so.
        module: Trains.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._optimizer: Optimizer = trainer.optimizers[0]
        self._generators = own_generators(module.modules())

    def begin(self) -> None:
        """Remembers what the first step is to begin with, before its batch's forward."""
        self._start = RandomState(*self._generators)
        self._training = [(part, part.training) for part in self._module.modules()]
        self._settings: list[list[dict[str, Any]]] = []

    def add(self) -> None:
        """Remembers the settings of the step that was just taken, which a schedule may change."""
        self._settings.append(self._settings_now())

    def _settings_now(self) -> list[dict[str, Any]]:
        return [
            {name: each for name, each in group.items() if name != "params"} for group in self._optimizer.param_groups
        ]

    def run(self, steps: Sequence[MeasuredStep]) -> bool:
        """Takes all steps but the last again, and tells whether they were the same.

        Parameters, optimizer state and buffers have to be those of the beginning; where it returns False they are
        neither those nor these.

        Args:
            steps: All since the beginning, with their batches and losses.
        """
        now, attributes = self._settings_now(), Attributes(self._module.named_modules())
        try:
            with (
                random_state(self._generators),
                torch.inference_mode(False),
                torch.enable_grad(),
                silent(self._trainer, self._module.modules()),
            ):
                self._start.restore()
                for part, is_training in self._training:  # validation is told of before it begins
                    part.training = is_training
                return self._repeat(steps)
        except Exception as error:  # an optimizer that asks for a closure, say
            log.debug("The steps could not be repeated", exc_info=error)
            return False
        finally:
            attributes.put_back()
            self._set(now)

    def _repeat(self, steps: Sequence[MeasuredStep]) -> bool:
        step = type(self._optimizer).step
        step = getattr(step, "__wrapped__", step) if hasattr(step, "hooked") else step  # without anybody's hooks
        for measured, settings in zip(steps[:-1], self._settings, strict=False):
            loss = self._loss(measured)
            if not _is_same(loss, measured):
                return False
            self._optimizer.zero_grad()
            loss.backward()
            self._module.clip_gradients(
                self._optimizer, self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
            )
            self._set(settings)
            step(self._optimizer)
        buffers = [(each, each.clone()) for each in self._module.buffers()]
        is_same = _is_same(self._loss(steps[-1]), steps[-1])
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return is_same

    def _loss(self, measured: MeasuredStep) -> Tensor:
        with self._trainer.precision_plugin.train_step_context():
            loss: Tensor = self._module.loss(measured.batch)  # type: ignore[operator]
        return loss

    def _set(self, settings: Sequence[dict[str, Any]]) -> None:
        for group, values in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(values)


def _is_same(loss: Tensor, measured: MeasuredStep) -> bool:
    now, then = loss.detach().sum().item(), measured.loss
    return isinstance(then, float) and (now == then or (math.isnan(now) and math.isnan(then)))
