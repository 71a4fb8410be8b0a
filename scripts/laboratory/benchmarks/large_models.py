"""What observing costs a large model on a GPU: the time that it adds to a step, and the memory."""

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader

from downslope.callbacks import (
    CriticalLearningRate,
    FlightRecorder,
    GradientMonitor,
    LearningRateEffects,
    VerdictMonitor,
)
from downslope.logs.tensorboard import TensorBoard

BEGINNING, LATER = (34, 100), (140, 240)  # steps that are timed: the first are watched closely
NUM_STEPS = 1 + LATER[1]
IDLE = 145  # a step that nobody measures
NUM_BATCHES = 16


class Task(LightningModule):
    """A network that computes its own loss, under AdamW."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, batch: Tensor) -> Tensor:
        """Returns the network's."""
        loss: Tensor = self.network(batch)
        return loss

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Layers(nn.Sequential):
    """Linear layers of one width, and the mean square of what comes out."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__(*itertools.chain(*((nn.Linear(width, width), nn.Tanh()) for _ in range(num_layers))))

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self:
            rows = layer(rows)
        return rows.square().mean()


class Gpt2(nn.Module):
    """A language model of GPT-2's shape: 124 million parameters as it is given by default."""

    def __init__(self, num_layers: int = 12, width: int = 768, num_words: int = 50257, length: int = 512) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.words(tokens[:, :-1]) + self.places, mask=self.mask, is_causal=True)
        logits = linear(hidden, self.words.weight)  # tied
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def fit(
    device: str, network: Callable[[], nn.Module], batches: Sequence[Tensor], *callbacks: Callback, **settings: Any
) -> LightningModule:
    """Trains on a GPU (`gpu`) or a CPU (`cpu`), one step a batch."""
    seed_everything(0, verbose=False)
    with torch.device("cuda" if device == "gpu" else "cpu"):
        module = Task(network())
    trainer = Trainer(
        max_epochs=1, accelerator=device, devices=1, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **{"logger": False, **settings},
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return module


class Clock(Callback):
    """Seconds, and memory, of stretches of steps; at their ends alone the device is waited for."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, int], float] = {}
        self.peak: dict[tuple[int, int], int] = {}
        self.held = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for stretch in (BEGINNING, LATER):
            if batch_idx in stretch:
                wait()
            if batch_idx == stretch[0]:
                self._start = time.perf_counter()
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
            elif batch_idx == stretch[1]:
                self.seconds[stretch] = time.perf_counter() - self._start
                self.peak[stretch] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        if batch_idx == IDLE and torch.cuda.is_available():
            self.held = torch.cuda.memory_allocated()


def wait() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def observers(folder: Path, every_n_steps: int) -> dict[str, Callback]:
    """Returns the default observers."""
    return {
        "GradientMonitor": GradientMonitor(every_n_steps=every_n_steps),
        "LearningRateEffects": LearningRateEffects(every_n_steps=every_n_steps),
        "CriticalLearningRate": CriticalLearningRate(),
        "FlightRecorder": FlightRecorder(folder=str(folder)),
        "VerdictMonitor": VerdictMonitor(print_verdict=False),
    }


def cost(
    device: str,
    folder: Path,
    network: Callable[[], nn.Module],
    batches: Sequence[Tensor],
    rounds: int,
    each_alone: bool = False,
    **settings: Any,
) -> list[str]:
    """Returns the rows of a table, each what some observers cost, measured in turn."""
    names = [*observers(folder, 1)]
    kinds = {None: (50, ()), "all, every 50 steps": (50, names), "all, every step": (1, names)}
    alone = {f"{name} alone, every step": (1, (name,)) for name in names} if each_alone else {}
    clocks: dict[str | None, list[Clock]] = {kind: [] for kind in (*kinds, *alone)}
    many = [batches[index % len(batches)] for index in range(NUM_STEPS)]
    fit(device, network, many[:10], **settings)  # what is done once
    for number, (kind, (every, chosen)) in enumerate([*rounds * [*kinds.items()], *alone.items()]):
        clock, logger = Clock(), TensorBoard(str(folder / f"{id(network)}_{number}"))
        watching = [each for name, each in observers(folder, every).items() if name in chosen]
        fit(device, network, many, *watching, clock, logger=logger, **settings)
        clocks[kind].append(clock)
        del watching  # with the last gradient that one has kept
        gc.collect()
    size, bare = sum(each.nbytes for each in network().parameters()), clocks.pop(None)
    milliseconds = [1000 * each.seconds[LATER] / (LATER[1] - LATER[0]) for each in bare]
    rows = [f"| none: a step takes {', '.join(f'{each:.2f}' for each in milliseconds)} ms | | | | |"]
    for kind, mine in clocks.items():
        more = [f"{_median(mine, part) / _median(bare, part) - 1:+.1%}" for part in (BEGINNING, LATER)]
        held, peak = (mine[-1].held - bare[-1].held) / size, (mine[-1].peak[LATER] - bare[-1].peak[LATER]) / size
        rows.append(f"| {kind} | {more[0]} | {more[1]} | {held:.2f} P | {peak:.2f} P |")
    return rows


def _median(clocks: Sequence[Clock], stretch: tuple[int, int]) -> float:
    return median(each.seconds[stretch] for each in clocks)


def layers(device: str, folder: Path) -> list[str]:
    """Ten layers of 1024 units, batch 1024."""
    num_layers, width, rows = (10, 1024, 1024) if device == "gpu" else (4, 128, 16)
    place = "cuda" if device == "gpu" else "cpu"
    batches = [*torch.randn(NUM_BATCHES, rows, width).to(place)]
    return cost(device, folder, lambda: Layers(num_layers, width), batches, rounds=3, each_alone=True)


def gpt2(device: str, folder: Path) -> list[str]:
    """GPT-2, 124 million parameters, bf16-mixed, 8 × 512 words."""
    sizes = (12, 768, 50257, 512) if device == "gpu" else (2, 64, 100, 16)
    place = "cuda" if device == "gpu" else "cpu"
    batches = [*torch.randint(sizes[2], (NUM_BATCHES, 8, sizes[3] + 1)).to(place)]
    return cost(device, folder, lambda: Gpt2(*sizes), batches, rounds=2, precision="bf16-mixed")
