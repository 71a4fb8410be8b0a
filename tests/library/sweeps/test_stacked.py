"""Members trained at once, held against torch's own optimizers in a loop, one member at a time."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from downslope.sweeps.stacked import CannotStackError, StackedOptimizer, stacked_loss

RATES = [1e-3, 1e-2, 5e-2]
STEPS = 60


class Network(nn.Module):
    """Any module that has a loss."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), *layers, nn.Tanh(), nn.Linear(5, 1))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        features, target = batch
        return nn.functional.mse_loss(self.layers(features)[:, 0], target)


def batches(num: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)) for _ in range(num)]


def network(*layers: nn.Module) -> Network:
    torch.manual_seed(1)
    return Network(*layers).double()


def serial(module: nn.Module, kind: type[Optimizer], settings: dict[str, Any], clip: float | None = None) -> Any:
    module = copy.deepcopy(module)
    optimizer = kind(module.parameters(), **settings)
    for features, target in batches():
        optimizer.zero_grad()
        module.loss((features.double(), target.double())).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return {name: value.detach() for name, value in module.state_dict().items()}


def stacked(module: nn.Module, kind: type[Optimizer], settings: list[dict[str, Any]], **clip: Any) -> dict[str, Tensor]:
    num = len(settings)
    stack = {name: each.detach().repeat(num, *[1] * each.dim()) for name, each in module.named_parameters()}
    parameters = {name: nn.Parameter(each) for name, each in stack.items()}
    buffers = {name: each.repeat(num, *[1] * each.dim()) for name, each in module.named_buffers()}
    loss = stacked_loss(module, buffers)
    together: dict[str, Any] = {}
    for name, value in settings[0].items():
        if isinstance(value, bool):
            together[name] = value
        elif isinstance(value, tuple):
            columns = zip(*(each[name] for each in settings), strict=True)
            together[name] = tuple(torch.tensor(column, dtype=torch.float64) for column in columns)
        else:
            together[name] = torch.tensor([each[name] for each in settings], dtype=torch.float64)
    optimizer = StackedOptimizer(list(parameters.values()), kind, together, list(buffers.values()), **clip)
    for features, target in batches():

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = loss(parameters, (features.double(), target.double()))  # noqa: B023
            losses.sum().backward()
            return losses

        optimizer.step(closure)
    return dict(zip([*parameters, *buffers], optimizer.weights(), strict=True))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SGD, {}),
        (SGD, {"momentum": [0.0, 0.5, 0.9], "dampening": [0.5, 0.0, 0.3]}),
        (SGD, {"momentum": [0.2, 0.5, 0.9], "nesterov": True, "weight_decay": [0.0, 0.1, 0.01]}),
        (Adam, {"betas": [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)], "weight_decay": [0.0, 0.1, 0.01]}),
        (AdamW, {"weight_decay": [0.0, 0.1, 1.0], "eps": [1e-8, 1e-3, 1e-5]}),
        (RMSprop, {"alpha": [0.9, 0.99, 0.5], "momentum": [0.0, 0.5, 0.9]}),
        (RMSprop, {"centered": True, "weight_decay": [0.0, 0.1, 0.01], "eps": [1e-8, 1e-3, 1e-5]}),
    ],
)
def test_each_member_steps_as_under_torchs_own_optimizer(kind: type[Optimizer], settings: dict[str, Any]) -> None:
    told = [
        {"lr": rate, **{name: value if isinstance(value, bool) else value[index] for name, value in settings.items()}}
        for index, rate in enumerate(RATES)
    ]
    found = stacked(network(), kind, told)
    for index, each in enumerate(told):
        for name, value in serial(network(), kind, each).items():
            torch.testing.assert_close(found[name][index], value, rtol=1e-9, atol=1e-12)


def test_each_member_is_clipped_at_its_own_norm() -> None:
    clips = [0.05, 0.2, 1e9]
    found = stacked(network(), SGD, [{"lr": 0.05}] * 3, clip=torch.tensor(clips, dtype=torch.float64))
    for index, clip in enumerate(clips):
        for name, value in serial(network(), SGD, {"lr": 0.05}, clip).items():
            torch.testing.assert_close(found[name][index], value, rtol=1e-9, atol=1e-12)


def test_batch_normalization_keeps_statistics_of_its_own_for_each_member() -> None:
    found = stacked(network(nn.BatchNorm1d(5)), SGD, [{"lr": rate} for rate in RATES])
    for index, rate in enumerate(RATES):
        for name, value in serial(network(nn.BatchNorm1d(5)), SGD, {"lr": rate}).items():
            torch.testing.assert_close(found[name][index], value, rtol=1e-8, atol=1e-10)


def test_a_member_that_diverges_is_frozen_at_its_last_good_weights_and_the_others_go_on() -> None:
    """θ ← (1 − ηa)θ by hand: the loss ½aθ² exceeds 10⁶ times the first once |1 − ηa|ᵗ > 10³."""
    parameter = nn.Parameter(torch.ones(3, 1, dtype=torch.float64))
    rates = torch.tensor([0.1, 3.0, 0.5], dtype=torch.float64)
    optimizer = StackedOptimizer([parameter], SGD, {"lr": rates})

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = parameter[:, 0] ** 2 / 2
        losses.sum().backward()
        return losses

    for _ in range(20):
        optimizer.step(closure)
    assert optimizer.alive.tolist() == [0, 2]
    assert optimizer.num_steps.tolist() == [20, 10, 20]  # |1 − 3|¹⁰ = 1024 is the first beyond 10³
    expected = [[0.9**20], [(-2.0) ** 10], [0.5**20]]
    torch.testing.assert_close(optimizer.weights()[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "settings"), [(torch.optim.LBFGS, {}), (SGD, {"maximize": True})])
def test_what_has_no_stacked_form_is_refused_by_name(kind: type[Optimizer], settings: dict[str, Any]) -> None:
    with pytest.raises(CannotStackError, match=f"{kind.__name__}.* has no stacked form"):
        StackedOptimizer([nn.Parameter(torch.ones(2, 1))], kind, settings)
