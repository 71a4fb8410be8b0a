"""How many samples a second go through training once it runs: start-up is left out."""

import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.report import MISSING, installed, print_report, show_progress
from downslope.launch.quick_steps import quicken
from downslope.tables.batches import Batch, Batches, ShuffledOrder
from template.regression.manual import ManualLinearRegression
from template.regression.model import LinearRegression

NUM_ROWS = 65_536
NUM_FEATURES = (10, 100, 1000)
BATCH_SIZES = (32, 256, 4096)
LEARNING_RATE = 1e-4  # stable in every case: numbers that overflow are not computed at the usual speed

Measure = Callable[[Tensor, Tensor, int, float], float]


def steps(rounds: int, seconds: float) -> None:
    """Measures every way of training in each case, and prints samples a second.

    Args:
        rounds: Measurements of each, in turn; the median counts.
        seconds: How long each measurement trains.
    """
    torch.set_num_threads(1)  # as SGDRegressor; several wait for each other wherever a core is busy elsewhere
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's tips on loaders and loggers
    rows = []
    for num_features, batch_size in itertools.product(NUM_FEATURES, BATCH_SIZES):
        show_progress(f"steps, {num_features} features, batch {batch_size}")
        rows.append([str(num_features), str(batch_size), *_case(num_features, batch_size, rounds, seconds)])
    show_progress("")
    header = ("features", "batch", *WAYS, "automatic ÷ bare", "automatic ÷ default `DataLoader`")
    print_report(header, rows, _notes(rounds, seconds))


def _case(num_features: int, batch_size: int, rounds: int, seconds: float) -> list[str]:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_ROWS, num_features, generator=random)
    target = features.sum(dim=1) + torch.randn(NUM_ROWS, generator=random)
    for measure in WAYS.values():
        measure(features, target, batch_size, seconds / 10)  # to warm up
    measured = [[measure(features, target, batch_size, seconds) for measure in WAYS.values()] for _ in range(rounds)]
    rates = [median(column) for column in zip(*measured, strict=True)]
    bare, automatic, _, default, _ = zip(*measured, strict=True)
    ratios = [
        median(ours / theirs for ours, theirs in zip(automatic, others, strict=True)) for others in (bare, default)
    ]
    return [
        *(f"{rate:,.0f}" if rate > 0 else MISSING for rate in rates),
        *(f"{ratio:.2f}" for ratio in ratios),
    ]


def bare_loop(features: Tensor, target: Tensor, batch_size: int, seconds: float) -> float:
    """Returns the samples a second of a loop written by hand over tensors in memory, shuffled each epoch."""
    model = nn.Linear(features.shape[1], 1)
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
    num_samples, started = 0, time.perf_counter()
    while True:
        for rows in torch.randperm(len(target)).split(batch_size):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(features[rows]).squeeze(-1), target[rows])
            loss.backward()
            optimizer.step()
            num_samples += len(rows)
            if (taken := time.perf_counter() - started) >= seconds:
                return num_samples / taken


class Stopwatch(LightningModule):
    """Stops training after some seconds, and counts samples: in hooks that Lightning calls in any case."""

    seconds: float

    def on_train_start(self) -> None:
        """Starts the clock."""
        self.num_samples, self.started = 0, time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Counts, and stops when the time is up."""
        self.num_samples += len(batch[1])
        self.taken = time.perf_counter() - self.started
        if self.taken >= self.seconds:
            self.trainer.should_stop = True


class Automatic(Stopwatch, LinearRegression):
    """Ours."""


class Manual(Stopwatch, ManualLinearRegression):
    """Ours, with the cycle written out."""


class Plain(Stopwatch):
    """The least that Lightning asks for: no metric, no logging."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, 1)

    def training_step(self, batch: Batch) -> Tensor:
        """Returns the mean squared error."""
        return nn.functional.mse_loss(self.linear(batch[0]).squeeze(-1), batch[1])

    def configure_optimizers(self) -> Optimizer:
        """Returns plain gradient descent."""
        return SGD(self.parameters(), lr=LEARNING_RATE)


def _ours(model: type[Automatic | Manual], features: Tensor, target: Tensor, batch_size: int, seconds: float) -> float:
    module = model(features.shape[1], partial(SGD, lr=LEARNING_RATE), {"scheduler": None})
    return _fit(module, Batches(features, target, batch_size, ShuffledOrder(len(target), seed=0)), seconds)


def default_loader(features: Tensor, target: Tensor, batch_size: int, seconds: float) -> float:
    """Returns the samples a second of Lightning over the loader that its tutorials show."""
    loader = DataLoader(TensorDataset(features, target), batch_size, shuffle=True)
    return _fit(Plain(features.shape[1]), loader, seconds)


def _fit(module: Stopwatch, batches: Iterable[Batch], seconds: float) -> float:
    module.seconds = seconds
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if isinstance(module, LinearRegression):
        quicken(trainer, module)
    trainer.fit(module, batches)
    return module.num_samples / module.taken


def scikit_learn(features: Tensor, target: Tensor, batch_size: int, seconds: float) -> float:
    """Returns the samples a second of SGDRegressor, 0 where it is not installed."""
    if not installed("scikit-learn"):
        return 0.0
    from sklearn.linear_model import SGDRegressor

    one_epoch = SGDRegressor(penalty=None, learning_rate="constant", eta0=LEARNING_RATE, max_iter=1, tol=None)
    inputs, outputs = features.numpy(), target.numpy()
    num_samples, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < seconds:
        one_epoch.fit(inputs, outputs)
        num_samples += len(outputs)
    return num_samples / taken


WAYS: dict[str, Measure] = {
    "bare loop": bare_loop,
    "automatic": partial(_ours, Automatic),
    "manual": partial(_ours, Manual),
    "Lightning, default `DataLoader`": default_loader,
    "scikit-learn `SGDRegressor`": scikit_learn,
}


def _notes(rounds: int, seconds: float) -> list[str]:
    notes = [
        f"Samples a second, {NUM_ROWS:,} rows, one thread; {seconds} s each in turn, median of {rounds}. "
        "All shuffle each epoch; no logger, no callbacks. "
        "`SGDRegressor` knows no batches: it steps at every row."
    ]
    if not installed("scikit-learn"):
        notes.append(f"{MISSING}: scikit-learn is not installed; `pip install -e .[benchmark]` brings it.")
    return notes
