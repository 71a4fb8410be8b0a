"""Parameters that several processes hold in parts: observers say that they are off, and training is the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from downslope.callbacks import (
    CriticalLearningRate,
    FlightRecorder,
    GradientMonitor,
    LearningRateEffects,
    SharpnessMonitor,
    VerdictMonitor,
)
from tests.conftest import ROOT

OBSERVERS = (
    CriticalLearningRate, FlightRecorder, GradientMonitor, LearningRateEffects, SharpnessMonitor, VerdictMonitor,
)  # fmt: skip


class Sharded(LightningModule):
    """FSDP2, as Lightning's own example has it: on a CPU by gloo."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.folder = folder

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()  # type: ignore[no-any-return]  # a call of a module has no type

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_train_end(self) -> None:
        parts = [each.to_local() for each in self.parameters()]  # type: ignore[operator]  # they are DTensors
        torch.save(parts, f"{self.folder}/{self.global_rank}.pt")


def train(folder: Path, *kinds: type) -> str:
    """Trains in two processes; returns what they say."""
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(folder), *(kind.__name__ for kind in kinds)]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.mark.slow
def test_of_sharded_parameters_observers_say_that_they_are_off_and_training_is_the_same(tmp_path: Path) -> None:
    said = train(tmp_path / "with", *OBSERVERS)
    for kind in OBSERVERS:
        reason = "under ModelParallelStrategy each process holds only a part of every parameter"
        assert said.count(f"{kind.__name__} is off from here on: {reason}.") == 2
    train(tmp_path / "without")
    for rank in "01":
        parts, others = (torch.load(tmp_path / name / f"{rank}.pt") for name in ("with", "without"))
        assert all(map(torch.equal, parts, others))


if __name__ == "__main__":
    seed_everything(0, verbose=False)
    Trainer(
        accelerator="cpu", devices=2, max_steps=10, logger=False, enable_checkpointing=False,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
        callbacks=[kind() for kind in OBSERVERS if kind.__name__ in sys.argv[2:]],
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(Sharded(sys.argv[1]), DataLoader(torch.randn(64, 8), batch_size=4))  # type: ignore[arg-type]  # rows are a dataset  # fmt: skip
