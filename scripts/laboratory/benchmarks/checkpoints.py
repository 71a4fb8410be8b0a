"""What checkpoints cost: a run with them over the same run without, in turn, and one of their writes taken apart."""

import hashlib
import io
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.observers import Seconds
from benchmarks.report import print_report, show_progress
from downslope.callbacks import Checkpoints
from downslope.runs.checkpoints import load_checkpoint
from downslope.runs.whole_files import whole_file
from template.train import build

EVERY = 30.0  # seconds, the default
HEADER = (
    *("run", "seconds", "added, processor", "added, clock", "writes", "a write, MB", "serialise, ms", "SHA-256, ms"),
    *("to the disk, ms", "two every 30 s"),
)
Parts = tuple[LightningModule, LightningDataModule, Trainer]


class Network(LightningModule):
    """Three layers, Adam: a checkpoint of three numbers a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (64, width, width, 1)
        layers = [nn.Sequential(nn.Linear(*pair), nn.Tanh()) for pair in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*layers)

    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        """Returns the mean squared error."""
        return nn.functional.mse_loss(self.layers(batch[0])[:, 0], batch[1])

    def validation_step(self, batch: Sequence[Tensor]) -> None:
        """Logs it, so that there is a best."""
        self.log("val/loss", self.training_step(batch))

    def configure_optimizers(self) -> Optimizer:
        """Returns Adam."""
        return Adam(self.parameters(), lr=1e-4)


class Data(LightningDataModule):
    """Random rows."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns batches of 256."""
        features = torch.randn(8192, 64, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(features, features.sum(dim=1).tanh()), 256)

    val_dataloader = train_dataloader


class Clocks(Callback):
    """Times training, from its first step until everything is written."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts."""
        self.started = Seconds.now()


class Counted(Checkpoints):
    """Counts the files that are written."""

    num_writes = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Counts whatever goes through the Trainer's writer of checkpoints."""
        super().setup(trainer, pl_module, stage)
        write = trainer.strategy.checkpoint_io.save_checkpoint

        def count(*arguments: Any, **settings: Any) -> None:
            self.num_writes += 1
            write(*arguments, **settings)

        trainer.strategy.checkpoint_io.save_checkpoint = count  # type: ignore[method-assign]


CONFIGURATION = Path(__file__).parents[3] / "conf"


def default_run() -> Parts:
    """Makes what `scripts/train.py` trains, with nothing beside it."""
    with initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        config = compose("train", ["callbacks=none", "logger=none", "device=cpu", "+trainer.enable_progress_bar=false"])
    datamodule, module, trainer = build(config)
    return module, datamodule, trainer


def network(width: int, num_epochs: int) -> Callable[[], Parts]:
    """Makes a network and its Trainer."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    settings: dict[str, Any] = {**quiet, "enable_model_summary": False, "max_epochs": num_epochs}
    return lambda: (Network(width), Data(), Trainer(**settings))


def checkpoints(rounds: int, quick: bool) -> None:
    """Measures every run, and prints what checkpoints add to it.

    Args:
        rounds: Measurements of each, in turn; the median of the rounds' ratios counts.
        quick: Whether to leave out the large networks.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's tips on loaders and loggers
    runs = {"the default run": default_run} | {
        f"MLP, {width**2 + 66 * width + 1:,} parameters": network(width, num_epochs)
        for width, num_epochs in ([(64, 2)] if quick else [(64, 10), (512, 5), (2048, 1)])
    }
    rows = []
    for name, make in runs.items():
        show_progress(f"checkpoints, {name}")
        rows.append([name, *_row(make, rounds)])
    show_progress("")
    notes = [
        f"Processor time and time by the clock that `Checkpoints` adds at its defaults, from the first step until "
        f"everything is written; in turn, the median of {rounds} rounds' ratios; one thread of torch. A run that is "
        f"shorter than {EVERY:.0f} s writes what it must: the last and the best. One write, the median of nine: its "
        "size, and its parts by the clock, flushed to the disk. Last column: what a long run pays where it writes two "
        f"such files every {EVERY:.0f} s."
    ]
    print_report(HEADER, rows, notes)


def _row(make: Callable[[], Parts], rounds: int) -> list[str]:
    bare, processor, wall = [], [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk, which /tmp may not be
        for number in range(rounds + 1):
            keeper = Counted(folder)
            without, taken = _time(make(), []), _time(make(), [keeper])
            if number:  # the first warms up
                bare.append(without.wall)
                processor.append(taken.processor / without.processor)
                wall.append(taken.wall / without.wall)
        parts = _write(Path(folder) / "last.ckpt")
        size = (Path(folder) / "last.ckpt").stat().st_size
    return [
        f"{median(bare):.2f}",
        *(f"{100 * (median(ratios) - 1):+.1f} %" for ratios in (processor, wall)),
        f"{keeper.num_writes}",
        f"{size / 1e6:.2f}",
        *(f"{1000 * part:.1f}" for part in parts),
        f"{2 * sum(parts) / EVERY:.2%}",
    ]


def _time(parts: Parts, callbacks: list[Callback]) -> Seconds:
    module, datamodule, trainer = parts
    clocks = Clocks()
    trainer.callbacks += [clocks, *callbacks]  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=datamodule)
    return Seconds.now().since(clocks.started)


def _write(file: Path) -> tuple[float, float, float]:
    """Seconds to serialise a checkpoint, to sum it up, and to write it, flushed and renamed."""
    checkpoint = load_checkpoint(file)
    measured = []
    for _ in range(9):
        times = [Seconds.now().wall]
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        times.append(Seconds.now().wall)
        hashlib.sha256(buffer.getbuffer()).hexdigest()
        times.append(Seconds.now().wall)
        with whole_file(file) as stream:
            stream.write(buffer.getbuffer())
        times.append(Seconds.now().wall)
        measured.append([later - earlier for earlier, later in itertools.pairwise(times)])
    serialise, digest, disk = (median(column) for column in zip(*measured, strict=True))
    return serialise, digest, disk
