"""What observers keep between steps, in shares of the parameters' memory (docs/costs.md)."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader

from downslope.callbacks import (
    CriticalLearningRate,
    FlightRecorder,
    GradientMonitor,
    LearningRateEffects,
    Pictures,
    SharpnessMonitor,
    VerdictMonitor,
)
from downslope.logs.tensorboard import step_writer

AT_REST = 120  # steps: no observer is due, and no judgement near


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200))

    def loss(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Adam:
        return Adam(self.parameters(), lr=1e-4)


class Memory(Callback):
    """Adds up the tensors that are alive at rest, when what waits to be written has been."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == AT_REST:
            step_writer(trainer).flush()
            gc.collect()
            tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
            trainer.should_stop = True
            self.num_bytes = sum(dict(map(place_and_size, tensors)).values())


def place_and_size(tensor: Tensor) -> tuple[int, int]:
    try:
        return tensor.data_ptr(), tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # one that torch.func has wrapped, left by another test: no memory
        return 0, 0


def num_bytes(folder: Path, *observers: Callback) -> int:
    memory = Memory()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=AT_REST + 20,  # the end is judged, too
        logger=TensorBoardLogger(folder),
        callbacks=[*observers, memory],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(), DataLoader([torch.ones(1, 200)] * (AT_REST + 30), batch_size=None))  # type: ignore[arg-type]
    return memory.num_bytes


def others(folder: Path) -> list[Callback]:
    return [
        GradientMonitor(),
        LearningRateEffects(),
        CriticalLearningRate(),
        SharpnessMonitor(),
        VerdictMonitor(print_verdict=False),
        Pictures(str(folder)),
    ]


CASES: dict[str, tuple[Callable[[Path], list[Callback]], float, float]] = {
    "FlightRecorder, exact: parameters and Adam's two states": (lambda _: [FlightRecorder(mode="exact")], 2.99, 3.05),
    "FlightRecorder, block: the same": (lambda _: [FlightRecorder(mode="block")], 2.99, 3.15),
    "FlightRecorder, late": (lambda _: [FlightRecorder(mode="late")], 0.0, 0.05),
    "all others together: SharpnessMonitor's eigenvector": (others, 0.99, 1.15),
}


@pytest.mark.parametrize("case", CASES)
def test_so_much_is_kept_beside_the_parameters(tmp_path: Path, case: str) -> None:
    observers, least, most = CASES[case]
    parameters = sum(each.nbytes for each in Network().parameters())
    kept = num_bytes(tmp_path, *observers(tmp_path)) - num_bytes(tmp_path)
    assert least * parameters <= kept <= most * parameters
