"""A batch's loss once more, without a trace: nothing that training reads is changed by a bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from downslope.steps.loss_function import SILENT, training_loss
from downslope.steps.random_state import RandomState, random_state


def why_no_replay(trainer: Trainer, module: LightningModule) -> str | None:
    """Returns why a batch's loss cannot be had again, None where it can."""
    if len(trainer.optimizers) != 1:
        return "there are several optimizers, and it is not known which loss belongs to whom"
    if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        return "LBFGS evaluates the loss many times a step"
    if trainer.world_size > 1:
        return "each process knows the loss of its own share of the batch alone"
    try:
        training_loss(module)
    except ValueError as error:
        return str(error)
    return None


class Replay:
    """Computes the loss of a batch with the present weights, under the random numbers of its first forward.

    Dropout drops the same elements. Afterwards random states, buffers (batch norm), metrics and gradients are what
    they were, and nothing has been logged.

    Args:
        trainer: Its precision is used.
        module: With automatic optimization its `training_step` gives the loss, else its `loss(batch)`.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._loss = training_loss(module)
        self._parts: list[Module] = []
        self._epoch: int | None = None

    def loss(self, batch: Any, batch_index: int, state: RandomState) -> Tensor:
        """Returns a batch's loss, detached.

        Args:
            batch: As `training_step` got it.
            batch_index: The same.
            state: Of the generators before the first forward.
        """
        if self._epoch != self._trainer.current_epoch:  # to look through a large module takes as long as a small one's
            self._epoch = self._trainer.current_epoch  # whole forward
            self._parts = [part for part in self._module.modules() if part._buffers or isinstance(part, Metric)]
        with (
            random_state(state),
            torch.no_grad(),
            self._trainer.precision_plugin.train_step_context(),
            silent(self._trainer),
            _without_a_trace(self._module, self._parts),
        ):
            loss: Tensor = self._loss(self._module, batch, batch_index).detach()
            return loss


@contextmanager
def _without_a_trace(module: LightningModule, parts: Sequence[Module]) -> Iterator[None]:
    kept = [(part._buffers, dict(part._buffers)) for part in parts if part._buffers]
    buffers = [buffer for _, each in kept for buffer in each.values() if buffer is not None]
    values = [buffer.detach().clone() for buffer in buffers]
    metrics = [(metric, _copy(metric)) for metric in parts if isinstance(metric, Metric)]
    vars(module).update(SILENT)
    try:
        yield
    finally:
        for name in SILENT:
            del vars(module)[name]
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
        for part, each in kept:
            part.update(each)
        for metric, state in metrics:
            vars(metric).update(state)


def _copy(metric: Metric) -> dict[str, Any]:
    """A metric adds to its tensors in place and appends to its lists."""
    copies: dict[str, Any] = {}
    for name, value in vars(metric).items():
        copies[name] = value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
    return copies


@contextmanager
def silent(trainer: Trainer) -> Iterator[None]:
    """Takes the trainer's loggers away: a module may write to its logger directly."""
    loggers, trainer.loggers = trainer.loggers, [DummyLogger() for _ in trainer.loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
