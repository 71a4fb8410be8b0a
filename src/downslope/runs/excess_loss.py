"""The training loss of the last weights, exactly: to be held against a closed form."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call


@torch.no_grad()
def training_loss(trainer: Trainer, module: LightningModule) -> float:
    """Returns the mean of `module.loss(batch)` over the training rows, computed in float64 on the CPU.

    So the figure is that of the weights alone, whatever device and precision trained them. Several processes share the
    rows as they did in training. The module, whose `loss` is a mean over the rows of a batch, is left as it was.
    """
    named = (*module.named_parameters(), *module.named_buffers())
    state = {f"module.{name}": wide(tensor) for name, tensor in named}
    was_training = module.training
    module.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for batch in trainer.train_dataloader or ():
        rows = extract_batch_size(batch)
        loss = functional_call(_Loss(module), state, (apply_to_collection(batch, Tensor, wide),))
        total += torch.stack([rows * loss.double(), torch.tensor(rows, dtype=torch.float64)])
    module.train(was_training)
    if trainer.world_size > 1:
        total = trainer.strategy.reduce(total.to(trainer.strategy.root_device), reduce_op="sum").cpu()
    return float(total[0] / total[1])


def wide(tensor: Tensor) -> Tensor:
    """Returns it on the CPU, and a number with a point in float64."""
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


class _Loss(nn.Module):
    """A module whose forward is the loss of another, which is what `functional_call` can call."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        loss: Tensor = self.module.loss(batch)
        return loss
