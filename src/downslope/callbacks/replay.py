"""A batch's loss once more, without a trace: nothing that training reads is changed by a bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from downslope.gradients.random_state import RandomState, random_state


def why_no_replay(trainer: Trainer, module: LightningModule) -> str | None:
    """Returns why a batch's loss cannot be had again, None where it can."""
    if len(trainer.optimizers) != 1:
        return "there are several optimizers, and it is not known which loss belongs to whom"
    if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        return "LBFGS evaluates the loss many times a step"
    if trainer.world_size > 1:
        return "each process knows the loss of its own share of the batch alone"
    if not module.automatic_optimization and not callable(getattr(module, "loss", None)):
        return "under manual optimization `training_step` takes a step: give the module a method `loss(batch)`"
    return None


def replay(trainer: Trainer, module: LightningModule, batch: Any, batch_index: int, state: RandomState) -> Tensor:
    """Returns the loss of a batch with the present weights, under the random numbers of its first forward.

    Dropout drops the same elements. Afterwards random states, buffers (batch norm), metrics and gradients are what
    they were, and nothing has been logged.

    Args:
        trainer: Its precision is used.
        module: With automatic optimization its `training_step` gives the loss, else its `loss(batch)`.
        batch: As `training_step` got it.
        batch_index: The same.
        state: Of the generators before the first forward.
    """
    with (
        random_state(state),
        torch.no_grad(),
        trainer.precision_plugin.train_step_context(),
        _without_a_trace(module),
    ):
        loss: Tensor = _loss(module)(batch, batch_index)
        return loss.detach()


def _loss(module: LightningModule) -> Callable[[Any, int], Tensor]:
    if not module.automatic_optimization:
        return lambda batch, _: module.loss(batch)  # type: ignore[operator]

    def loss(batch: Any, batch_index: int) -> Tensor:
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        output = module.training_step(batch, batch_index) if takes_index else module.training_step(batch)
        value = output["loss"] if isinstance(output, dict) else output
        assert isinstance(value, Tensor)
        return value

    return loss


@contextmanager
def _without_a_trace(module: LightningModule) -> Iterator[None]:
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    metrics = [(metric, _copy(metric)) for metric in module.modules() if isinstance(metric, Metric)]
    silenced = {"log": _say_nothing, "log_dict": _say_nothing}
    module.__dict__.update(silenced)
    try:
        yield
    finally:
        for name in silenced:
            del module.__dict__[name]
        for buffer, value in buffers:
            buffer.copy_(value)
        for metric, state in metrics:
            metric.__dict__.update(state)


def _copy(metric: Metric) -> dict[str, Any]:
    """A metric adds to its tensors in place and appends to its lists."""
    copies: dict[str, Any] = {}
    for name, value in metric.__dict__.items():
        copies[name] = value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
    return copies


def _say_nothing(*_: Any, **__: Any) -> None:
    """Stands in for `self.log`."""
