"""Real small networks that nobody tuned for, each under twelve rates, with all that the observers saw of it.

Thresholds are chosen on the first part of the tasks. The second was judged once, with other data, architectures and
seeds, and what came of it changed rules; so did a look at the last, which is judged under other seeds and optimizers.
"""

import gzip
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from downslope.callbacks import CriticalLearningRate, SharpnessMonitor, VerdictMonitor
from downslope.verdict import Evidence

Part = Literal["chosen", "second", "unseen"]
Criterion = Callable[[Tensor, Tensor], Tensor]

NUM_STEPS = 240
NUM_RATES = 12
DIGITS = Path(__file__).parents[3] / "src" / "template" / "digits" / "digits.csv.gz"


@dataclass(frozen=True)
class Task:
    """What is trained: a network, its data, and the loss."""

    part: Part
    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    criterion: Criterion
    batch_size: int


@dataclass(frozen=True)
class Method:
    """An optimizer, and between which rates it is tried."""

    make: Callable[..., Optimizer]
    least: float
    largest: float

    @property
    def rates(self) -> list[float]:
        """Twelve, evenly spaced in their logarithm."""
        return [float(rate) for rate in np.geomspace(self.least, self.largest, NUM_RATES)]


METHODS = {
    "sgd": Method(SGD, 1e-4, 30.0),
    "momentum": Method(lambda parameters, lr: SGD(parameters, lr, momentum=0.9), 1e-5, 10.0),
    "adam": Method(Adam, 1e-6, 1.0),
    "adamw": Method(AdamW, 1e-6, 1.0),
    "rmsprop": Method(RMSprop, 1e-6, 1.0),
}


# --- data ---------------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits in units of their spread."""
    with gzip.open(DIGITS) as file:
        table = torch.tensor(np.loadtxt(file, delimiter=","), dtype=torch.float32)
    images = table[:, :-1] / 16
    return (images - images.mean()) / images.std(), table[:, -1].long()


@cache
def curve() -> tuple[Tensor, Tensor]:
    """What another network makes of eight numbers, and noise."""
    random = torch.Generator().manual_seed(7)
    inputs = torch.randn(1024, 8, generator=random)
    hidden = torch.tanh(inputs @ torch.randn(8, 16, generator=random) / 8**0.5)
    return inputs, hidden @ torch.randn(16, generator=random) + 0.1 * torch.randn(1024, generator=random)


@cache
def spirals() -> tuple[Tensor, Tensor]:
    """Three arms in the plane, and six numbers that say nothing."""
    random = torch.Generator().manual_seed(11)
    arm = torch.randint(3, (1500,), generator=random)
    along = torch.rand(1500, generator=random)
    angle = 4 * along + 2 * math.pi / 3 * arm + 0.2 * torch.randn(1500, generator=random)
    plane = along[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return torch.cat([2 * plane, torch.randn(1500, 6, generator=random)], 1), arm


@cache
def bars() -> tuple[Tensor, Tensor]:
    """Images of 12 × 12 with a bar in one of six directions, somewhere, under noise."""
    random = torch.Generator().manual_seed(13)
    kind = torch.randint(6, (1200,), generator=random)
    angle, shift = kind * math.pi / 6, 3 * torch.rand(1200, generator=random) - 1.5
    rows, columns = torch.meshgrid(torch.arange(12) - 5.5, torch.arange(12) - 5.5, indexing="ij")
    distance = rows * angle.cos()[:, None, None] + columns * angle.sin()[:, None, None] - shift[:, None, None]
    images = torch.exp(-(distance**2)) + 0.5 * torch.randn(1200, 12, 12, generator=random)
    return images.flatten(1), kind


@cache
def letters() -> tuple[Tensor, Tensor]:
    """Sequences of twelve letters, each likely after the one two places before it; the target is the next letter."""
    random = torch.Generator().manual_seed(17)
    likely = torch.randint(12, (12, 12), generator=random)
    text = torch.randint(12, (1200, 13), generator=random)
    for place in range(2, 13):
        follows = torch.rand(1200, generator=random) < 0.8
        text[:, place] = torch.where(follows, likely[text[:, place - 1], text[:, place - 2]], text[:, place])
    return text[:, :-1], text[:, 1:]


@cache
def waves() -> tuple[Tensor, Tensor]:
    """Twenty readings of two waves under noise; the target is where they go."""
    random = torch.Generator().manual_seed(19)
    frequency, phase = torch.rand(2, 1000, 1, 2, generator=random)
    times = torch.arange(21.0)[:, None]
    readings = torch.sin((0.2 + 0.8 * frequency) * times + 6.3 * phase).sum(-1)
    return (readings[:, :-1] + 0.05 * torch.randn(1000, 20, generator=random))[..., None], readings[:, -1]


@cache
def folded() -> tuple[Tensor, Tensor]:
    """Thirty numbers that four make, to be had again from themselves."""
    random = torch.Generator().manual_seed(23)
    rows = torch.tanh(torch.randn(1000, 4, generator=random) @ torch.randn(4, 30, generator=random))
    return rows, rows


@cache
def pulses() -> tuple[Tensor, Tensor]:
    """Signals of 32 readings with a pulse of one of four shapes, somewhere, under noise."""
    random = torch.Generator().manual_seed(29)
    kind = torch.randint(4, (1300,), generator=random)
    away = torch.arange(32.0) - 6 - 20 * torch.rand(1300, 1, generator=random)
    near = (away.abs() < 4).float()
    shapes = torch.stack([near, near * away.sign(), near * (4 - away.abs()) / 2, torch.exp(-(away**2) / 4) - near / 2])
    return shapes[kind, torch.arange(1300)] + 0.3 * torch.randn(1300, 32, generator=random), kind


@cache
def surface() -> tuple[Tensor, Tensor]:
    """A wavy function of three of six numbers, and noise."""
    random = torch.Generator().manual_seed(31)
    inputs = 2 * torch.rand(1600, 6, generator=random) - 1
    heights = torch.sin(4 * inputs[:, 0]) + 2 * inputs[:, 1] * inputs[:, 2]
    return inputs, heights + 0.1 * torch.randn(1600, generator=random)


@cache
def halves() -> tuple[Tensor, Tensor]:
    """Twelve numbers, and on which side of each of five curved sheets they lie."""
    random = torch.Generator().manual_seed(37)
    inputs = torch.randn(1500, 12, generator=random)
    bent = inputs + 0.5 * inputs.roll(1, 1).square() - 0.5
    return inputs, (bent @ torch.randn(12, 5, generator=random) > 0).float()


@cache
def most() -> tuple[Tensor, Tensor]:
    """Fifteen letters of six; the target is the one that occurs most."""
    random = torch.Generator().manual_seed(41)
    text = torch.randint(6, (1400, 15), generator=random)
    favoured = torch.randint(6, (1400, 1), generator=random)
    text = torch.where(torch.rand(1400, 15, generator=random) < 0.3, favoured, text)
    return text, functional.one_hot(text, 6).sum(1).argmax(1)


@cache
def noisy_digits() -> tuple[Tensor, Tensor]:
    """Digits, to be had from themselves under noise."""
    images = digits()[0]
    return images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(43)), images


def digits_again() -> tuple[Tensor, Tensor]:
    """Digits, to be had again from themselves."""
    return digits()[0], digits()[0]


# --- networks -----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions around which the input goes, too."""

    def __init__(self, width: int, normalize: Callable[[int], nn.Module]) -> None:
        super().__init__()
        parts = [nn.Conv2d(width, width, 3, padding=1), normalize(width), nn.ReLU()]
        self.inner = nn.Sequential(*parts, nn.Conv2d(width, width, 3, padding=1), normalize(width))

    def forward(self, images: Tensor) -> Tensor:
        changed: Tensor = (images + self.inner(images)).relu()
        return changed


def resnet(size: int, width: int, num_classes: int, normalize: Callable[[int], nn.Module]) -> nn.Module:
    """Two residual blocks."""
    start = [nn.Unflatten(1, (1, size, size)), nn.Conv2d(1, width, 3, stride=2, padding=1), normalize(width), nn.ReLU()]
    blocks = [Residual(width, normalize), Residual(width, normalize)]
    return nn.Sequential(*start, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes))


class Recurrent(nn.Module):
    """The last state of a recurrent layer, mapped to the output."""

    def __init__(self, layer: nn.RNNBase, num_outputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, num_outputs)

    def forward(self, sequences: Tensor) -> Tensor:
        sequences = sequences.view(len(sequences), -1, self.layer.input_size)
        output: Tensor = self.head(self.layer(sequences)[0][:, -1]).squeeze(-1)
        return output


class Pooled(nn.Module):
    """What a transformer without places makes of each letter, averaged."""

    def __init__(self, num_letters: int, width: int) -> None:
        super().__init__()
        self.letters, self.head = nn.Embedding(num_letters, width), nn.Linear(width, num_letters)
        self.layer = nn.TransformerEncoderLayer(width, 4, width, dropout=0.1, batch_first=True, activation="gelu")

    def forward(self, text: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(self.letters(text)).mean(1))
        return output


class Skipping(nn.Module):
    """A layer around which the input goes, too, normalised before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, rows: Tensor) -> Tensor:
        changed: Tensor = rows + self.inner(rows)
        return changed


class LanguageModel(nn.Module):
    """A transformer that sees only what came before."""

    def __init__(self, num_letters: int, length: int, width: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(num_letters, width), nn.Parameter(0.1 * torch.randn(length, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, num_letters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, text: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(self.letters(text) + self.places, src_mask=self.mask))
        return output.transpose(1, 2)


def mlp(*widths: int, between: Callable[[int], list[nn.Module]]) -> nn.Sequential:
    """Linear layers, and what stands between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), *between(outputs)]
    return nn.Sequential(*layers[: len(layers) - len(between(1))])


def _relu(width: int) -> list[nn.Module]:
    return [nn.ReLU()]


def _cnn() -> nn.Module:
    start = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()]
    return nn.Sequential(*start, nn.Flatten(), nn.Linear(256, 10))


def _pooled_cnn() -> nn.Module:
    start = [nn.Unflatten(1, (1, 12, 12)), nn.Conv2d(1, 12, 5, padding=2), nn.GELU(), nn.MaxPool2d(2)]
    return nn.Sequential(*start, nn.Conv2d(12, 16, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 6))


def _pulse_cnn() -> nn.Module:
    start = [nn.Unflatten(1, (1, 32)), nn.Conv1d(1, 12, 5, stride=2), nn.ReLU(), nn.Conv1d(12, 16, 5), nn.ReLU()]
    return nn.Sequential(*start, nn.AdaptiveMaxPool1d(2), nn.Flatten(), nn.Linear(32, 4))


def _separable() -> nn.Module:
    start = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU()]
    middle = [nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.GELU()]
    return nn.Sequential(*start, *middle, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10))


def _denoiser() -> nn.Module:
    down = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.LeakyReLU()]
    return nn.Sequential(
        *down, nn.ConvTranspose2d(12, 8, 2, stride=2), nn.LeakyReLU(), nn.Conv2d(8, 1, 1), nn.Flatten()
    )


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Linear(8, 16), layer, nn.Flatten(), nn.Linear(128, 10))


TASKS = {
    "MLP": Task("chosen", lambda: mlp(64, 64, 64, 10, between=_relu), digits, functional.cross_entropy, 64),
    "CNN": Task("chosen", _cnn, digits, functional.cross_entropy, 64),
    "ResNet": Task("chosen", lambda: resnet(8, 8, 10, nn.BatchNorm2d), digits, functional.cross_entropy, 64),
    "transformer": Task("chosen", _transformer, digits, functional.cross_entropy, 64),
    "LSTM": Task(
        "chosen", lambda: Recurrent(nn.LSTM(8, 24, batch_first=True), 10), digits, functional.cross_entropy, 32
    ),
    "autoencoder": Task("chosen", lambda: mlp(64, 32, 8, 32, 64, between=_relu), digits_again, functional.mse_loss, 64),
    "regression": Task(
        "chosen",
        lambda: nn.Sequential(mlp(8, 32, 1, between=lambda width: [nn.Tanh()]), nn.Flatten(0)),
        curve,
        functional.mse_loss,
        64,
    ),
    "deep MLP": Task(
        "second",
        lambda: mlp(8, 48, 48, 48, 48, 3, between=lambda width: [nn.LayerNorm(width), nn.GELU()]),
        spirals,
        functional.cross_entropy,
        50,
    ),
    "pooled CNN": Task("second", _pooled_cnn, bars, functional.cross_entropy, 40),
    "ResNet, groups": Task(
        "second", lambda: resnet(12, 12, 6, lambda width: nn.GroupNorm(3, width)), bars, functional.cross_entropy, 48
    ),
    "language model": Task("second", lambda: LanguageModel(12, 12, 24), letters, functional.cross_entropy, 64),
    "GRU": Task("second", lambda: Recurrent(nn.GRU(1, 20, batch_first=True), 1), waves, functional.mse_loss, 32),
    "autoencoder, narrow": Task(
        "second",
        lambda: mlp(30, 24, 4, 24, 30, between=lambda width: [nn.Tanh()]),
        folded,
        functional.smooth_l1_loss,
        100,
    ),
    "MLP, dropout": Task(
        "second",
        lambda: mlp(64, 80, 40, 10, between=lambda w: [nn.BatchNorm1d(w), nn.ReLU(), nn.Dropout(0.3)]),
        digits,
        functional.cross_entropy,
        80,
    ),
    "pulse CNN": Task("unseen", _pulse_cnn, pulses, functional.cross_entropy, 36),
    "LSTM, two layers": Task(
        "unseen", lambda: Recurrent(nn.LSTM(4, 20, 2, batch_first=True), 4), pulses, functional.cross_entropy, 50
    ),
    "wide regression": Task(
        "unseen", lambda: nn.Sequential(mlp(6, 256, 1, between=_relu), nn.Flatten(0)), surface, functional.mse_loss, 128
    ),
    "residual MLP": Task(
        "unseen",
        lambda: nn.Sequential(nn.Linear(12, 32), Skipping(32), Skipping(32), nn.Linear(32, 5)),
        halves,
        functional.binary_cross_entropy_with_logits,
        60,
    ),
    "pooled transformer": Task("unseen", lambda: Pooled(6, 16), most, functional.cross_entropy, 40),
    "denoiser": Task("unseen", _denoiser, noisy_digits, functional.mse_loss, 64),
    "separable CNN": Task("unseen", _separable, digits, functional.cross_entropy, 100),
}


# --- training -----------------------------------------------------------------------------------------------------


class Network(LightningModule):
    """A task as Lightning trains it."""

    def __init__(self, net: nn.Module, criterion: Criterion, optimizer: Callable[..., Optimizer], decays: bool) -> None:
        super().__init__()
        self.net, self.criterion, self.optimizer, self.decays = net, criterion, optimizer, decays
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        """Of a batch."""
        return self.criterion(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            self.trainer.should_stop = True
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.net.parameters())
        if not self.decays:
            return optimizer
        schedule = CosineAnnealingLR(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Witness(VerdictMonitor):
    """Keeps the evidence of each judgement."""

    def __init__(self) -> None:
        super().__init__(print_verdict=False)
        self.seen: list[Evidence] = []

    def _judge(self, trainer: Trainer, evidence: Evidence) -> None:
        super()._judge(trainer, evidence)
        self.seen.append(evidence)


@dataclass(frozen=True)
class Course:
    """A training that has ended: the loss of each step's batch, and the evidence of each judgement."""

    losses: list[float]
    seen: list[Evidence]

    @property
    def last(self) -> float:
        """Mean of the last losses; infinite where one is not finite."""
        mean = sum(self.losses[-20:]) / len(self.losses[-20:])
        return mean if math.isfinite(mean) else math.inf


def train(
    module: Network,
    data: tuple[Tensor, Tensor],
    batch_size: int,
    num_steps: int,
    observe: bool = True,
    more: Sequence[Callback] = (),
    **trainer: Any,
) -> Course:
    """Trains a network, batches in an order of their own."""
    witness = Witness()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, ExitStack() as quiet:
        warnings.simplefilter("ignore")
        quiet.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        loader = DataLoader(
            TensorDataset(*data),
            batch_size,
            shuffle=True,
            drop_last=len(data[0]) > batch_size,
            generator=torch.Generator().manual_seed(0),
        )
        Trainer(
            max_steps=num_steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=DummyLogger() if observe else False,
            default_root_dir=folder,
            callbacks=[CriticalLearningRate(), SharpnessMonitor(), *more, witness] if observe else [*more],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **trainer,
        ).fit(module, loader)
    return Course(module.losses, witness.seen)


class Courses:
    """Trains what is asked for, once: what came of it is kept in a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, Course] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            key, losses, seen = json.loads(line)
            self._known[key] = Course(losses, [_evidence(each) for each in seen])

    def course(self, name: str, method: str, rate: float, num_steps: int = NUM_STEPS, observe: bool = True) -> Course:
        """A task under an optimizer at a rate."""
        key = f"{name} {method} {rate:.3g} {num_steps} {observe}"
        if key not in self._known:
            task = TASKS[name]
            course = train(network(name, method, rate), task.data(), task.batch_size, num_steps, observe)
            self._known[key] = course
            with self._file.open("a") as stream:
                stream.write(json.dumps([key, course.losses, [asdict(each) for each in course.seen]]) + "\n")
        return self._known[key]


def network(name: str, method: str, rate: float) -> Network:
    """A task's network as it begins, under an optimizer at a rate; a third of the pairs with a cosine schedule."""
    task = TASKS[name]
    torch.manual_seed(list(TASKS).index(name) + 100 * (task.part == "unseen"))
    optimizer = partial(METHODS[method].make, lr=rate)
    return Network(task.make(), task.criterion, optimizer, decays(name, method))


def _evidence(stored: dict[str, Any]) -> Evidence:
    known = {name: value for name, value in stored.items() if name in Evidence.__dataclass_fields__}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    return Evidence(**values)


def pairs(part: Part) -> list[tuple[str, str]]:
    """Tasks and optimizers: on the chosen tasks all but RMSprop, of the others three fifths."""
    names = [name for name, task in TASKS.items() if task.part == part]
    if part == "chosen":
        return [(name, method) for method in METHODS if method != "rmsprop" for name in names]
    places = [(place, index) for index in range(len(METHODS)) for place in range(len(names))]
    left_out = (1, 3) if part == "second" else (0, 2)
    return [(names[place], [*METHODS][index]) for place, index in places if (place + index) % 5 not in left_out]


def decays(name: str, method: str) -> bool:
    """Whether the rate falls along a cosine: for a third of the pairs."""
    return (list(TASKS).index(name) + list(METHODS).index(method)) % 3 == 0
