"""The loss of a batch once more, for observers: training goes on as if it had never been computed."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def rehearsal(trainer: Trainer, module: LightningModule) -> Iterator[LightningModule]:
    """Lends a copy of the module, whose loss and derivatives leave no trace in training.

    What the copy changes is its own: parameters and `.grad`, buffers (batch norm), metrics, counters, lists. What it
    logs is dropped. It begins with the random numbers that training will use next (Python, NumPy, torch on CPU and
    CUDA), and hands them back. It computes what can be derived twice: in the parameters' own precision, without
    autocast and its scaler, without compiled code and without fused attention.

    Args:
        trainer: Trains the module.
        module: Can be copied by `copy.deepcopy`; its hooks are copied along.

    Yields:
        The copy, attached to the trainer.
    """
    twin = copy.deepcopy(module)  # Lightning leaves the trainer out
    with suppress(ValueError):  # it was not compiled as a whole
        to_uncompiled(twin)
    twin.trainer = trainer
    for part in twin.modules():
        if isinstance(part, LightningModule):
            vars(part)["log"] = _drop  # `log_dict` goes through it
    loggers, trainer.loggers = trainer.loggers, [DummyLogger() for _ in trainer.loggers]
    try:
        with (
            isolate_rng(),
            torch.compiler.set_stance("force_eager"),
            sdpa_kernel(SDPBackend.MATH),
            trainer.precision_plugin.train_step_context(),  # 16-true makes tensors in 16 bits …
            torch.autocast(module.device.type, enabled=False),  # … and 16-mixed casts to them
        ):
            yield twin
    finally:
        trainer.loggers = loggers


def training_loss(twin: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Returns the loss that a module trains on, with its graph.

    It is that of `training_step` or, because this would step the optimizer under manual optimization, there that of
    a method `loss(batch)`.

    Args:
        twin: From `rehearsal`.
        batch: On the module's device; a copy, because a step may change it.
        batch_idx: Its place in the epoch.

    Raises:
        ValueError: There is no such method, or no loss comes back.
    """
    if twin.automatic_optimization:
        takes_index = is_param_in_hook_signature(twin.training_step, "batch_idx", min_args=2)
        output = twin.training_step(batch, batch_idx) if takes_index else twin.training_step(batch)
    elif callable(loss_method := getattr(type(twin), "loss", None)):
        output = loss_method(twin, batch)
    else:
        raise ValueError("manual optimization hides the loss: give the module a method `loss(batch)` that returns it")
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError(f"no loss came back to take derivatives of, but {type(loss).__name__}")
    return loss.squeeze()


def _drop(*_: object, **__: object) -> None:
    """Takes a logged value to nowhere."""
