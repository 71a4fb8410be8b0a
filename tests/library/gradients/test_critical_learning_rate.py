import math
from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from downslope.gradients.critical_learning_rate import MAX_EVALUATIONS, critical_learning_rate

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda parameters, lr: SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: SGD(parameters, lr=lr, momentum=0.9),
    "adam": lambda parameters, lr: Adam(parameters, lr=lr),
    "adamw": lambda parameters, lr: AdamW(parameters, lr=lr, weight_decay=0.1),
    "rmsprop": lambda parameters, lr: RMSprop(parameters, lr=lr),
}


class Counted:
    def __init__(self, loss: Callable[[float], float]) -> None:
        self.loss, self.rates = loss, list[float]()

    def __call__(self, rate: float) -> float:
        self.rates.append(rate)
        return self.loss(rate)


def quadratic(seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """H with a condition number up to 1e4, θ, and a floor of the loss."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 12, (1,), generator=generator))
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    spectrum = 10 ** (4 * torch.rand(size, generator=generator, dtype=torch.float64) - 2)
    theta = torch.randn(size, generator=generator, dtype=torch.float64)
    return basis * spectrum @ basis.T, theta, float(torch.rand(1, generator=generator))


def step_direction(name: str, hessian: torch.Tensor, theta: torch.Tensor, rate: float) -> tuple[torch.Tensor, ...]:
    """−Δθ/η of the optimizer's third step, and θ before it."""
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = OPTIMIZERS[name]([parameter], lr=rate)
    for _ in range(3):
        before = parameter.detach().clone()
        parameter.grad = hessian @ before
        optimizer.step()
    return (before - parameter.detach()) / rate, before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_closed_form_on_random_quadratics(name: str) -> None:
    errors, counts, num_tried = [], [], 0
    for seed in range(110):
        hessian, theta, floor = quadratic(seed)
        factor = 10 ** (-4 + 6 * ((seed * 0.618) % 1))  # from 1e-4 to 100 × 2/λ: the step itself is taken at 1e-3 × 2/λ
        limit = 2 / float(torch.linalg.eigvalsh(hessian)[-1])
        direction, start = step_direction(name, hessian, theta, 1e-3 * limit)
        slope = float(direction @ hessian @ start)
        if slope <= 0:
            continue
        exact = 2 * slope / float(direction @ hessian @ direction)

        def value(rate: float, h=hessian, s=start, d=direction, f=floor) -> float:
            moved = s - rate * d
            return float(moved @ h @ moved) / 2 + f

        loss = Counted(value)
        found = critical_learning_rate(loss, factor * exact)
        errors.append(abs(found / exact - 1))
        counts.append(len(loss.rates))
        num_tried += 1
    assert num_tried >= 90
    assert max(errors) < 0.1
    assert max(counts) <= MAX_EVALUATIONS
    assert sorted(counts)[len(counts) // 2] <= 7


@pytest.mark.parametrize("too_large_by", [1e-4, 1e-2, 0.5, 2.0, 1e2, 1e4])
def test_float32_costs_no_more_than_a_tenth(too_large_by: float) -> None:
    hessian, theta = quadratic(1)[0].float(), quadratic(1)[1].float()
    gradient = hessian @ theta
    exact = 2 * float(gradient @ gradient) / float(gradient @ hessian @ gradient)

    def loss(rate: float) -> float:
        moved = theta - rate * gradient
        return float(moved @ hessian @ moved) / 2

    assert critical_learning_rate(loss, too_large_by * exact) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("start", [1e-4, 1.0, 3.0, 1e3])
def test_a_loss_that_bends_or_overflows_is_bracketed_all_the_same(start: float) -> None:
    def steep(rate: float) -> float:  # −η + η⁴: the zero is at 1
        return 1 - rate + rate**4

    def overflowing(rate: float) -> float:  # −η + η·(e^(η − 1) …): the zero is at 1
        return 1 - rate + rate * math.exp(rate - 1) if rate < 500 else math.inf

    def flattening(rate: float) -> float:  # the zero is at 1
        return 1 - rate + rate * 2 * rate / (1 + rate)

    for loss in (steep, overflowing, flattening):
        counted = Counted(loss)
        assert critical_learning_rate(counted, start) == pytest.approx(1, rel=0.15)
        assert len(counted.rates) <= MAX_EVALUATIONS


def test_no_descent_direction_is_said() -> None:
    with pytest.raises(ValueError, match="no descent direction: the loss falls at no rate"):
        critical_learning_rate(lambda rate: 1 + rate, 0.1)


def test_rounding_below_the_start_is_no_fall() -> None:
    rounded = [1.0, 1 - 1e-8]
    with pytest.raises(ValueError, match="no descent direction"):
        critical_learning_rate(lambda rate: 1 + rate if rate > 1e-6 else rounded[rate > 0], 0.1)


def test_what_has_no_critical_rate_is_said() -> None:
    assert critical_learning_rate(lambda rate: 1 - rate, 0.1) == math.inf
    with pytest.raises(ValueError, match="no more than rounding"):
        critical_learning_rate(lambda _: 1.0, 0.1)
    with pytest.raises(ValueError, match="the loss is nan"):
        critical_learning_rate(lambda _: math.nan, 0.1)
    with pytest.raises(ValueError, match="`learning_rate` must"):
        critical_learning_rate(lambda _: 1.0, 0.0)
