"""What observing costs: the time of a run with observers over that of the same run without, in turn."""

import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.report import print_report, show_progress
from downslope.callbacks import FlightRecorder, GradientMonitor, LearningRateEffects
from downslope.data.batches import Batch, Batches, ShuffledOrder

FREQUENCIES = (50, 1)


@dataclass(frozen=True)
class Case:
    """A model, and the batches it is trained on."""

    name: str
    num_features: int
    widths: tuple[int, ...]
    batch_size: int


CASES = [
    *(Case(f"line, {features} features", features, (), size) for features in (10, 1000) for size in (32, 256, 4096)),
    Case("MLP, 20 tensors", 64, (64,) * 9, 64),
    Case("MLP, 20 tensors", 64, (64,) * 9, 1024),
    Case("MLP, 200 tensors", 32, (32,) * 99, 64),
]


class Network(LightningModule):
    """A line, or a line after some layers; it counts the time between its first and its last step."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = (case.num_features, *case.widths)
        hidden = [nn.Sequential(nn.Linear(*pair), nn.Tanh()) for pair in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], 1))

    def on_train_start(self) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_train_end(self) -> None:
        """Stops it."""
        self.seconds = time.perf_counter() - self.started

    def training_step(self, batch: Batch) -> Tensor:
        """Returns the mean squared error."""
        return nn.functional.mse_loss(self.layers(batch[0]).squeeze(-1), batch[1])

    def configure_optimizers(self) -> Optimizer:
        """Returns plain gradient descent."""
        return SGD(self.parameters(), lr=1e-4)


class Idle(Callback):
    """Does nothing in the hooks that an observer has."""

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Nothing."""


class GradNorm(Callback):
    """What Lightning's documentation shows: `grad_norm` and `log_dict`, here only where it is due."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs every norm."""
        if trainer.global_step % self.every_n_steps == 0:
            pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class Histograms(Callback):
    """What `wandb.watch` does: a histogram of every gradient, here into TensorBoard."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Writes every histogram."""
        if trainer.global_step % self.every_n_steps == 0 and isinstance(trainer.logger, TensorBoardLogger):
            for name, parameter in pl_module.named_parameters():
                assert parameter.grad is not None
                trainer.logger.experiment.add_histogram(name, parameter.grad, trainer.global_step)


def _ours(every_n_steps: int) -> list[Callback]:
    return [
        GradientMonitor(every_n_steps, histogram_every_n_steps=1_000_000_000),  # histograms have a column of their own
        LearningRateEffects(every_n_steps),
    ]


WAYS: dict[str, Callable[[int], list[Callback]]] = {
    "idle callback": lambda _: [Idle()],
    "ours": _ours,
    "ours and `FlightRecorder`": lambda every_n_steps: [*_ours(every_n_steps), FlightRecorder()],
    "`grad_norm` + `log_dict`": lambda every_n_steps: [GradNorm(every_n_steps)],
    "histograms": lambda every_n_steps: [Histograms(every_n_steps)],
}


def observers(rounds: int, seconds: float) -> None:
    """Measures every way of observing in each case, and prints what it adds to a run.

    Args:
        rounds: Measurements of each, in turn; the median of the rounds' ratios counts.
        seconds: How long a run without observers takes, about.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's tips on loaders and loggers
    rows = []
    for case in CASES:
        for every_n_steps in FREQUENCIES:
            show_progress(f"observers, {case.name}, batch {case.batch_size}, every {every_n_steps} steps")
            rows.append(_row(case, every_n_steps, rounds, seconds))
    show_progress("")
    header = ("model", "batch", "every", "step, ms", *WAYS)
    notes = [
        f"Time added to a run without observers, TensorBoard on; about {seconds} s each in turn, the median of "
        f"{rounds} rounds' ratios; one thread. Ours: `GradientMonitor` and `LearningRateEffects`, without histograms; "
        "`FlightRecorder` judges every step whatever the frequency. "
        "`grad_norm` computes norms alone, and only where it is due; documented as it is, it does so at every step."
    ]
    print_report(header, rows, notes)


def _row(case: Case, every_n_steps: int, rounds: int, seconds: float) -> list[str]:
    warm = _time(case, [], 50, every_n_steps)
    num_steps = max(50, round(seconds / (warm / 50) / 50) * 50)
    for way in WAYS.values():
        _time(case, way(every_n_steps), 50, every_n_steps)
    alone, ratios = [], []
    for _ in range(rounds):
        bare = _time(case, [], num_steps, every_n_steps)
        alone.append(bare / num_steps)
        ratios.append([_time(case, way(every_n_steps), num_steps, every_n_steps) / bare for way in WAYS.values()])
    added = [median(column) - 1 for column in zip(*ratios, strict=True)]
    figures = [f"{100 * each:+.1f} %" for each in added]
    return [case.name, str(case.batch_size), str(every_n_steps), f"{1000 * median(alone):.2f}", *figures]


def _time(case: Case, callbacks: list[Callback], num_steps: int, every_n_steps: int) -> float:
    """The seconds that some steps take, the writing included."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(max(case.batch_size, 8192), case.num_features, generator=random)
    target = features.sum(dim=1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=num_steps,
            max_epochs=-1,
            logger=TensorBoardLogger(folder, name="", version=""),
            callbacks=callbacks,
            log_every_n_steps=every_n_steps,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Network(case)
        trainer.fit(module, Batches(features, target, case.batch_size, ShuffledOrder(len(target), seed=0)))
        return module.seconds
