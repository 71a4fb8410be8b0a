"""What observing costs: the processor time of a run with observers over that of the same run without, in turn."""

import itertools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
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
from downslope.callbacks import (
    CriticalLearningRate,
    FlightRecorder,
    GradientMonitor,
    LearningRateEffects,
    SharpnessMonitor,
    VerdictMonitor,
)
from downslope.tables.batches import Batch, Batches, ShuffledOrder

FREQUENCIES = (50, 1)
FIRST = 100  # steps, which are all watched


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
    Case("MLP, 2.1 million elements", 512, (512,) * 8, 96),
]
QUICK = [CASES[0]]


@dataclass(frozen=True)
class Seconds:
    """How long a run took: by the processor's time, which another process takes little of, and by the clock."""

    processor: float
    wall: float

    @staticmethod
    def now() -> "Seconds":
        """Reads both clocks."""
        return Seconds(time.process_time(), time.perf_counter())

    def since(self, start: "Seconds") -> "Seconds":
        """Returns what has passed."""
        return Seconds(self.processor - start.processor, self.wall - start.wall)


class Network(LightningModule):
    """A line, or a line after some layers; it reads the clocks before its first step, and after the first hundred."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = (case.num_features, *case.widths)
        hidden = [nn.Sequential(nn.Linear(*pair), nn.Tanh()) for pair in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], 1))

    def on_train_start(self) -> None:
        """Starts the clocks."""
        self.started = Seconds.now()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reads the clocks between the first steps and the others."""
        if self.trainer.global_step == FIRST:
            self.middle = Seconds.now()

    def training_step(self, batch: Batch) -> Tensor:
        """Returns the loss."""
        return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
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


def _ours(every_n_steps: int, descent_ratio_every_n_steps: int | None = 50) -> list[Callback]:
    return [
        GradientMonitor(every_n_steps),
        LearningRateEffects(every_n_steps, descent_ratio_every_n_steps),
    ]


WAYS: dict[str, Callable[[int], list[Callback]]] = {
    "idle callback": lambda _: [Idle()],
    "ours": _ours,
    "ours, descent ratio as often": lambda every_n_steps: _ours(every_n_steps, every_n_steps),
    "ours and `FlightRecorder`": lambda every_n_steps: [*_ours(every_n_steps), FlightRecorder()],
    "ours and `FlightRecorder`, late": lambda every_n_steps: [*_ours(every_n_steps), FlightRecorder(mode="late")],
    "`VerdictMonitor`": lambda _: [VerdictMonitor(print_verdict=False)],
    "all defaults": lambda every_n_steps: [
        *_ours(every_n_steps),
        CriticalLearningRate(),
        FlightRecorder(),
        VerdictMonitor(print_verdict=False),
    ],
    "`SharpnessMonitor`": lambda _: [SharpnessMonitor()],
    "`grad_norm` + `log_dict`": lambda every_n_steps: [GradNorm(every_n_steps)],
    "histograms": lambda every_n_steps: [Histograms(every_n_steps)],
}


def observers(rounds: int, seconds: float, cases: Sequence[Case] = CASES) -> None:
    """Measures every way of observing in each case, and prints what it adds to a run.

    Args:
        rounds: Measurements of each, in turn; the median of the rounds' ratios counts.
        seconds: How long a run without observers takes, about.
        cases: What is trained.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's tips on loaders and loggers
    rows = []
    for case in cases:
        for every_n_steps in FREQUENCIES:
            show_progress(f"observers, {case.name}, batch {case.batch_size}, every {every_n_steps} steps")
            rows += _rows(case, every_n_steps, rounds, seconds)
    show_progress("")
    header = ("model", "batch", "steps", "step, processor ms", *WAYS)
    notes = [
        "Processor time, all threads together, that is added to a run without observers, and in brackets time by the "
        f"clock, in the first {FIRST} steps, all of which are watched, and later, until everything is written; about "
        f"{seconds} s each in turn, the median of {rounds} rounds' ratios; one thread of torch; {_load()}. "
        "Ours: `GradientMonitor` and `LearningRateEffects`, the descent ratio at every 50 steps, histograms at every "
        "100; `FlightRecorder` judges every step whatever the frequency, `SharpnessMonitor` measures at every 200. "
        "`grad_norm` computes norms alone, and only where it is due; documented as it is, it does so at every step."
    ]
    print_report(header, rows, notes)


def _rows(case: Case, every_n_steps: int, rounds: int, seconds: float) -> list[list[str]]:
    """What each way adds: to the first steps, which are all watched whatever the frequency, and to the others."""
    warm = sum(each.processor for each in _time(case, [], FIRST + 50, every_n_steps))
    num_steps = FIRST + max(50 if seconds < 0.1 else 200, round(seconds / (warm / (FIRST + 50)) / 50) * 50)
    for way in WAYS.values():
        _time(case, way(every_n_steps), FIRST + 1, every_n_steps)
    alone: list[Seconds] = []
    ratios: dict[str, list[list[Seconds]]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        bare = _time(case, [], num_steps, every_n_steps)
        alone.append(bare[1])
        for name, way in WAYS.items():
            watched = _time(case, way(every_n_steps), num_steps, every_n_steps)
            pairs = zip(watched, bare, strict=True)
            ratios[name].append([Seconds(one.processor / two.processor, one.wall / two.wall) for one, two in pairs])
    step = 1000 * median(each.processor for each in alone) / (num_steps - FIRST)
    parts = {0: f"the first {FIRST}"} if every_n_steps == FREQUENCIES[0] else {}
    return [
        [case.name, str(case.batch_size), words, f"{step:.2f}"]
        + [
            f"{_added(each[part].processor for each in way)} ({_added(each[part].wall for each in way)})"
            for way in ratios.values()
        ]
        for part, words in (parts | {1: f"later, every {every_n_steps}"}).items()
    ]


def _added(ratios: Iterable[float]) -> str:
    return f"{100 * (median(ratios) - 1):+.0f} %"


def _load() -> str:
    """What else the machine did."""
    return f"load {os.getloadavg()[1]:.1f}" if hasattr(os, "getloadavg") else "load unknown"


def _time(case: Case, callbacks: list[Callback], num_steps: int, every_n_steps: int) -> tuple[Seconds, Seconds]:
    """How long the first steps take, and the others till everything is written and the logger closed."""
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
        return module.middle.since(module.started), Seconds.now().since(module.middle)
