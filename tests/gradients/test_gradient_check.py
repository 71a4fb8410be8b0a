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
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
]  # fmt: skip


def sound_module(seed: int) -> Regression:
    """A random network of one to three random layers."""
    pick = random.Random(seed)
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):
        set_seed(seed)
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


# --- planted errors ----------------------------------------------------------------------------------------


def function(forward, backward):
    """A custom autograd.Function of one input."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            ctx.save_for_backward(inputs)
            return forward(inputs)

        @staticmethod
        def backward(ctx, gradient):
            return backward(ctx.saved_tensors[0], gradient)

    return Custom.apply


class Apply(nn.Module):
    """Wraps a function, beside a layer so that its inputs have parameters too."""

    def __init__(self, apply) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.apply_to = apply

    def forward(self, inputs: Tensor) -> Tensor:
        return self.apply_to(self.inner(inputs))


class EditsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.inner(inputs)
        self.inner.weight.data.mul_(2.0)  # after its use, before backward: the inputs get the edited one
        return outputs


class EditsBeforeBackward(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = inputs.exp()
        outputs.mul_(2.0)  # backward needs what exp() returned
        return outputs


class HiddenDetach(nn.Module):
    """Of two branches one is cut out of the graph."""

    def __init__(self, cut) -> None:
        super().__init__()
        self.kept, self.lost = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.cut = cut

    def forward(self, inputs: Tensor) -> Tensor:
        return self.kept(inputs) + 0.1 * self.cut(torch.tanh(self.lost(inputs)))


class ScalesItsGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.999,))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


def through_numpy(inputs: Tensor) -> Tensor:
    return torch.as_tensor(np.tanh(inputs.detach().numpy()))


def without_graph(inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return inputs * 2


def norm_by_item(inputs: Tensor) -> Tensor:
    return inputs / inputs.norm().item()


def edit_data(inputs: Tensor) -> Tensor:
    outputs = inputs * 1.0
    outputs.data.tanh_()
    return outputs


def masked_root(inputs: Tensor) -> Tensor:
    return torch.where(inputs > 1e6, inputs, (inputs * 0).sqrt() + inputs)  # 0/0 in backward


WRONG = {
    "square without its 2": function(lambda x: x**2, lambda x, g: g * x),
    "sine, sign of the cosine": function(torch.sin, lambda x, g: -g * x.cos()),
    "exp, off by a thousandth": function(torch.exp, lambda x, g: g * x.exp() * 1.001),
    "tanh as sigmoid": function(torch.tanh, lambda x, g: g * x.sigmoid() * (1 - x.sigmoid())),
    "identity, transposed sum": function(lambda x: x.sum(1, keepdim=True) * x, lambda x, g: g * x.sum(1, keepdim=True)),
    "softplus without the slope": function(functional.softplus, lambda x, g: g),
    "one column forgotten": function(lambda x: x * 2, lambda x, g: torch.cat([g[:, :-1] * 2, g[:, -1:] * 0], dim=1)),
    "mean taken for sum": function(lambda x: x - x.mean(1, keepdim=True), lambda x, g: g - g.sum(1, keepdim=True)),
    "straight through": function(torch.round, lambda x, g: g),
    "zero gradient": function(torch.tanh, lambda x, g: torch.zeros_like(g)),
    "noise in the gradient": function(torch.tanh, lambda x, g: g * (1 - x.tanh() ** 2) + 1e-3 * g.roll(1, 1)),
    "clipped gradient": function(lambda x: 3 * x, lambda x, g: (3 * g).clamp(-0.01, 0.01)),
    "through numpy": through_numpy,
    "no_grad": without_graph,
    "item": norm_by_item,
    "edit of .data": edit_data,
    "0/0 in backward": masked_root,
}  # fmt: skip

PLANTED = {
    **{name: lambda wrong=wrong: Apply(wrong) for name, wrong in WRONG.items()},
    "branch detached": lambda: HiddenDetach(torch.Tensor.detach),
    "branch through .data": lambda: HiddenDetach(lambda hidden: hidden.data),
    "branch as new tensor": lambda: HiddenDetach(lambda hidden: torch.tensor(hidden.tolist())),
    "weight edited": EditsItsWeight,
    "edit before backward": EditsBeforeBackward,
    "backward hook": ScalesItsGradient,
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_error_is_caught_in_each_of_ten_modules(name: str) -> None:
    missed = []
    for seed in range(10):
        torch.manual_seed(seed)
        layers = [PLANTED[name](), random.Random(seed).choice([nn.Tanh, nn.ReLU, nn.GELU, nn.Identity])()]
        module = Regression(nn.Sequential(nn.Linear(NUM_FEATURES, WIDTH), *layers, nn.Linear(WIDTH, 1)))
        if check(module, make_batch(seed), seed=seed).passed:
            missed.append(seed)
    assert missed == []
