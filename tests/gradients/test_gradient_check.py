import copy
import random

import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from downslope.gradients import GradientReport, check
from downslope.models import AutomaticLinearRegression, ManualLinearRegression

NUM_SOUND = 200
NUM_ROWS, NUM_FEATURES, WIDTH = 6, 3, 5


class Regression(LightningModule):
    """Any network under the mean squared error, as a user would write it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        features, target = batch
        loss = functional.mse_loss(self.network(features), target)
        self.log("train/loss", loss)
        return {"loss": loss}


def make_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(NUM_ROWS, NUM_FEATURES, generator=generator),
        torch.randn(NUM_ROWS, 1, generator=generator),
    )


def around(layer: nn.Module, seed: int = 0) -> Regression:
    torch.manual_seed(seed)
    return Regression(nn.Sequential(nn.Linear(NUM_FEATURES, WIDTH), layer, nn.Linear(WIDTH, 1)))


# --- sound modules -----------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.tanh(self.inner(inputs))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(1, WIDTH, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.zeros(1, len(inputs), WIDTH)  # in the default precision: it must fit that of the check
        return self.cell(inputs[:, :, None], (hidden, hidden))[0][:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 1, dropout=0.2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        sequence = inputs[:, None, :] * torch.linspace(0.5, 1.5, 3)[:, None]
        return self.attention(sequence, sequence, sequence)[0].mean(dim=1)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 2, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.max_pool1d(self.convolution(inputs[:, None]), 3, stride=1, padding=1).sum(dim=1)


class CastsToFloat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs.float())


class Noise(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        scale = random.random() + np.random.rand()  # noqa: NPY002 (the global state is the point)
        return inputs + scale * torch.randn_like(inputs)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.cached = [self.first.weight]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(inputs))) + inputs @ self.cached[0]


class SharpAtZero(nn.Module):
    """Weights that start at 0, so that ReLU, abs and max all sit on their kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.inner(inputs)
        return functional.relu(hidden) + hidden.abs() + hidden.amax(dim=1, keepdim=True)


SOUND = [
    nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.PReLU,
    Residual, Recurrent, Attention, Convolution, CastsToFloat, Noise, Frozen, Tied, SharpAtZero,
    lambda: nn.BatchNorm1d(WIDTH), lambda: nn.LayerNorm(WIDTH), lambda: nn.Dropout(0.4), lambda: nn.Softmax(dim=1),
    lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)),
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
]  # fmt: skip


def sound_module(seed: int) -> Regression:
    """A random network of one to three random layers."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    layers = [pick.choice(SOUND)() for _ in range(pick.randint(1, 3))]
    return Regression(nn.Sequential(nn.Linear(NUM_FEATURES, WIDTH), *layers, nn.Linear(WIDTH, 1)))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # deprecated, and still in many a model
def test_no_false_alarm_over_random_sound_modules() -> None:
    alarms = {}
    for seed in range(NUM_SOUND):
        report = check(sound_module(seed), make_batch(seed), seed=seed)
        if not report.passed:
            alarms[seed] = str(report)
    assert alarms == {}
