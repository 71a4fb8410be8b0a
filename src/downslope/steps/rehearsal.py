"""The loss of a batch once more, for observers: training goes on as if it had never been computed."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.compile import to_uncompiled
from torch.nn.attention import SDPBackend, sdpa_kernel

from downslope.steps.loss_function import SILENT
from downslope.steps.random_state import random_state
from downslope.steps.replay import silent


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
            vars(part).update(SILENT)
    with (
        silent(trainer),
        random_state(),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        trainer.precision_plugin.train_step_context(),  # 16-true makes tensors in 16 bits …
        torch.autocast(module.device.type, enabled=False),  # … and 16-mixed casts to them
    ):
        yield twin
