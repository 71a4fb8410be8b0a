"""`last.ckpt` is the newest state, `best.ckpt` the one with the least validation loss."""

import math
import time
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class Checkpoints(Checkpoint):
    """Saves the state of the run; never one that holds a non-finite weight.

    Args:
        folder: Where `last.ckpt` and `best.ckpt` go.
        monitor: The logged metric whose least value is best.
        every_n_seconds: How much work a killed run may lose.
    """

    def __init__(self, folder: str, monitor: str = "val/loss", every_n_seconds: float = 30.0) -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.every_n_seconds = every_n_seconds
        self.best = math.inf
        self._saved_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best and self._save(trainer, pl_module, "best.ckpt"):
            self.best = value

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = time.monotonic() - self._saved_at >= self.every_n_seconds
        if trainer.strategy.broadcast(due):  # all processes save together, whatever their clocks say
            self._save(trainer, pl_module, "last.ckpt")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "last.ckpt")

    def _save(self, trainer: Trainer, module: LightningModule, name: str) -> bool:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
            return False
        trainer.save_checkpoint(self.folder / name)
        self._saved_at = time.monotonic()
        return True
