"""The steps of a block once more, from where it began: to the bit, or not at all."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from downslope.steps.loss import silent, why_no_loss_of_a_step
from downslope.steps.optimizer_steps import each_batch_is_a_step, overrides
from downslope.steps.random_state import RandomState, own_generators, random_state
from downslope.steps.snapshot import fingerprint, held_and_states

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

    Whatever else has a say in a run (somebody's hook or callback, random numbers that a data set draws, an operation
    that is not deterministic) shows in its weights: only where parameters, optimizer state and buffers come out as they
    were, by a `fingerprint` of their bits, the steps are those of the run.

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
        self._training = self._modes()
        self._fingerprints: list[list[Tensor]] = []
        self._settings: list[list[dict[str, Any]]] = []

    def before_step(self) -> None:
        """Remembers what a step finds."""
        self._fingerprints.append(self._fingerprint())

    def after_step(self) -> None:
        """Remembers the settings that it was taken with, which a schedule may change."""
        self._settings.append(self._settings_now())

    def run(self, batches: Sequence[Any]) -> bool:
        """Takes a step for each batch but the last again, and tells whether the last one would find what it found.

        Parameters, optimizer state and buffers have to be those of the beginning; where it returns False they are
        neither those nor these.

        Args:
            batches: All since the beginning.
        """
        settings, modes = self._settings_now(), self._modes()
        try:
            with (
                random_state(self._generators),
                torch.inference_mode(False),
                torch.enable_grad(),
                silent(self._trainer, self._module.modules()),
            ):
                self._start.restore()
                _set_training(self._training)  # validation is told of before it begins
                for batch, taken_with in zip(batches[:-1], self._settings, strict=False):
                    self._step(batch, taken_with)
            pairs = zip(self._fingerprint(), self._fingerprints[len(batches) - 1], strict=True)
            return all(now.item() == then.item() for now, then in pairs)
        except Exception as error:  # an optimizer that asks for a closure, say
            log.debug("The steps could not be repeated", exc_info=error)
            return False
        finally:
            _set_training(modes)
            self._set(settings)

    def _step(self, batch: Any, settings: Sequence[dict[str, Any]]) -> None:
        self._optimizer.zero_grad()
        with self._trainer.precision_plugin.train_step_context():
            loss: Tensor = self._module.loss(batch)  # type: ignore[operator]  # it has one: `can_replay`
        loss.backward()
        self._module.clip_gradients(
            self._optimizer, self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
        )
        step = type(self._optimizer).step
        step = getattr(step, "__wrapped__", step) if hasattr(step, "hooked") else step  # without anybody's hooks
        with torch.no_grad():
            self._set(settings)
            step(self._optimizer)

    def _fingerprint(self) -> list[Tensor]:
        return fingerprint([*held_and_states([self._optimizer]), *self._module.buffers()])

    def _modes(self) -> list[tuple[nn.Module, bool]]:
        return [(part, part.training) for part in self._module.modules()]

    def _settings_now(self) -> list[dict[str, Any]]:
        return [
            {
                name: each.clone() if isinstance(each, Tensor) else each
                for name, each in group.items()
                if name != "params"
            }
            for group in self._optimizer.param_groups
        ]

    def _set(self, settings: Sequence[dict[str, Any]]) -> None:
        for group, values in zip(self._optimizer.param_groups, settings, strict=True):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    group[name].copy_(value)  # a schedule holds the same one
                else:
                    group[name] = value


def _set_training(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for part, is_training in modes:
        part.training = is_training
