import copy
import itertools
import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric

from downslope.steps import check
from template.regression.manual import ManualLinearRegression
from template.regression.model import LinearRegression
from tests.conftest import ROOT

NUM_SOUND = 200
NUM_ROWS, NUM_FEATURES, WIDTH = 6, 3, 5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are tiny: threads would spend the time waiting for each other
    yield
    torch.set_num_threads(before)


class Regression(LightningModule):
    """Any network under the mean squared error, as a user would write it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        features, target = batch
        loss = functional.mse_loss(self.network(features), target)
        self.log("train/loss", loss)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.loss(batch)}


def make_batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(NUM_ROWS, NUM_FEATURES, generator=generator),
        torch.randn(NUM_ROWS, 1, generator=generator),
    )


def around(layer: nn.Module, seed: int = 0) -> Regression:
    torch.manual_seed(seed)
    return Regression(nn.Sequential(nn.Linear(NUM_FEATURES, WIDTH), layer, nn.Linear(WIDTH, 1)))


# Sound modules: a check must never complain.


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
    lambda: nn.BatchNorm1d(WIDTH), lambda: nn.LayerNorm(WIDTH), lambda: nn.Dropout(0.4),
    lambda: nn.Softmax(dim=1),
    lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
]  # fmt: skip


def sound_module(seed: int) -> Regression:
    """A random network of one or two random layers."""
    pick = random.Random(seed)
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):
        set_seed(seed)
    layers = [pick.choice(SOUND)() for _ in range(pick.randint(1, 2))]
    return Regression(nn.Sequential(nn.Linear(NUM_FEATURES, WIDTH), *layers, nn.Linear(WIDTH, 1)))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # deprecated, and still in many a model
def test_no_false_alarm_over_random_sound_modules() -> None:
    alarms = {}
    for seed in range(NUM_SOUND):
        report = check(sound_module(seed), make_batch(seed), seed=seed)
        if not report.passed:
            alarms[seed] = str(report)
    assert alarms == {}


# Planted errors: a check must always complain.


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


class WithJvp(torch.autograd.Function):
    """A sine whose forward derivative is right, and whose backward is not."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        ctx.save_for_forward(inputs)
        return inputs.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].sin()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


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
    "product rule halved": function(lambda x: x.sum() * x, lambda x, g: g * x.sum()),
    "softplus without the slope": function(functional.softplus, lambda x, g: g),
    "one column forgotten": function(lambda x: x * 2, lambda x, g: g * torch.tensor([2.0, 2, 2, 2, 0])),
    "sum taken for mean": function(lambda x: x - x.mean(), lambda x, g: g - g.sum()),
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
def test_planted_error_is_caught_in_each_of_three_modules(name: str) -> None:
    missed = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers = [PLANTED[name](), random.Random(seed).choice([nn.Tanh, nn.GELU, nn.Identity])()]
        module = Regression(nn.Sequential(nn.Linear(NUM_FEATURES, WIDTH), *layers, nn.Linear(WIDTH, 1)))
        if check(module, make_batch(seed), seed=seed).passed:
            missed.append(seed)
    assert missed == []


@pytest.mark.parametrize(
    ("layer", "hint"),
    [
        (lambda: HiddenDetach(torch.Tensor.detach), "cut out of the graph"),
        (lambda: Apply(WRONG["square without its 2"]), "wrong backward, or a part that is cut"),
        (lambda: Apply(WithJvp.apply), "Look for a wrong backward."),
        (lambda: Apply(masked_root), "a root, a logarithm or a division at 0"),
    ],
)
def test_report_says_where_to_look(layer: type, hint: str) -> None:
    assert hint in str(check(around(layer()), make_batch()))


def test_report_names_the_detached_parameters_and_by_how_much() -> None:
    module = around(HiddenDetach(torch.Tensor.detach))
    report = check(module, make_batch())
    names = [each.parameter for each in report.disagreements]
    assert "network.1.lost.weight" in names
    assert "network.1.kept.weight" not in names
    assert "network.2.weight" not in names
    lost = report.disagreements[names.index("network.1.lost.weight")]
    assert lost.reverse == 0.0
    assert lost.difference == pytest.approx(abs(lost.numeric))


def test_halved_gradient_is_off_by_its_half() -> None:
    report = check(around(Apply(WRONG["square without its 2"])), make_batch())
    for each in report.disagreements:
        # central differences in float64 are good to ten digits
        assert each.reverse == pytest.approx(each.numeric / 2, rel=1e-6)
        assert each.difference == pytest.approx(abs(each.numeric) / 2, rel=1e-6)


def test_edit_in_place_is_reported_in_autograds_words() -> None:
    report = check(around(EditsBeforeBackward()), make_batch())
    assert not report.passed
    assert report.error is not None
    assert "modified by an inplace operation" in str(report)


def test_function_without_a_jvp_is_checked_without_forward_mode() -> None:
    right = function(torch.sin, lambda x, g: g * x.cos())
    report = check(around(Apply(right)), make_batch())
    assert report.passed
    assert report.without_forward_mode is not None
    assert "forward mode left out: You must implement the jvp function" in str(report)


def test_module_is_left_as_it_was() -> None:
    module = around(nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), Noise()))
    module.train_loss = MeanMetric()
    module.train_loss.update(2.0)
    module.network[1][1].eval()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = make_batch()
    before, kept = copy.deepcopy(module), [tensor.clone() for tensor in batch]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    assert check(module, batch).passed

    for (name, value), expected in zip(module.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())
    assert [part.training for part in module.modules()] == [part.training for part in before.modules()]
    assert module.train_loss.compute() == 2.0
    assert all(torch.equal(tensor, expected) for tensor, expected in zip(batch, kept, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


@pytest.mark.parametrize("kind", [LinearRegression, ManualLinearRegression])
def test_line_passes_without_a_trainer(kind: type[LightningModule]) -> None:
    features, target = make_batch()
    module = kind(NUM_FEATURES, torch.optim.SGD, {"scheduler": None})
    report = check(module, (features, target[:, 0]))
    assert report.passed
    assert report.num_parameters == 2


class WithoutLoss(Regression):
    loss = None
    network: nn.Module

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": functional.mse_loss(self.network(batch[0]), batch[1])}


def test_module_without_a_loss_says_what_to_do() -> None:
    module = WithoutLoss(around(nn.Tanh()).network)
    with pytest.raises(ValueError, match=r"WithoutLoss has no method `loss\(batch\)`: add one, or give .* `loss=`"):
        check(module, make_batch())
    assert check(module, make_batch(), loss=lambda module, batch: module.network(batch[0]).square().mean()).passed
    assert check(module, make_batch(), loss="training_step").passed
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="under manual optimization `training_step` takes a step"):
        check(module, make_batch(), loss="training_step")


def test_batch_may_be_nested() -> None:
    class Nested(Regression):
        def loss(self, batch: dict[str, list[Tensor]]) -> Tensor:
            return functional.mse_loss(self.network(batch["inputs"][0]), batch["targets"][0])

    features, target = make_batch()
    module = Nested(around(nn.Tanh()).network)
    assert check(module, {"inputs": [features], "targets": (target,)}).passed


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: None, "must return the loss, one number, got None"),
        (lambda loss: loss * torch.ones(2), "must return the loss, one number, got a tensor of shape"),
        (lambda loss: loss * float("nan"), "the loss is not finite: nan"),
        (lambda loss: loss * next(COUNTER), "make `loss` repeatable"),
    ],
)
def test_loss_that_cannot_be_checked_is_refused(returned, message: str) -> None:
    class Odd(Regression):
        def loss(self, batch: tuple[Tensor, Tensor]):
            return returned(super().loss(batch))

    with pytest.raises(ValueError, match=message):
        check(Odd(around(nn.Tanh()).network), make_batch())


COUNTER = itertools.count(1)


def test_more_directions_check_more() -> None:
    report = check(around(nn.Tanh()), make_batch(), num_directions=3)
    assert report.passed
    assert report.num_parameters == 4
    assert 0 < report.largest_difference < 1e-6  # of the order of ε^(2/3), times the curvature


def test_gradients_import_torch_alone() -> None:
    code = "import sys, downslope.gradients, derivatives; print({'lightning', 'hydra', 'sympy'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
