import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.gradients.least_squares import least_squares


def problem(num_rows: int, num_features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_features, generator=generator), torch.randn(num_rows, generator=generator)


@settings(max_examples=50, deadline=None)
@given(num_rows=st.integers(10, 60), num_features=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_the_optimum_is_that_of_lstsq(num_rows: int, num_features: int, seed: int) -> None:
    features, target = problem(num_rows, num_features, seed)
    line = least_squares(features, target)
    inputs = torch.cat([features, torch.ones(num_rows, 1)], dim=1).double()
    solution = torch.linalg.lstsq(inputs, target.double()).solution
    torch.testing.assert_close(line.parameters, solution, rtol=1e-8, atol=1e-10)
    assert line.loss == pytest.approx(float((inputs @ solution - target).square().mean()), rel=1e-12)


def test_the_sharpness_is_that_of_autograds_hessian() -> None:
    features, target = problem(30, 4, seed=1)
    inputs = torch.cat([features, torch.ones(30, 1)], dim=1).double()

    def loss(parameters: torch.Tensor) -> torch.Tensor:
        return (inputs @ parameters - target).square().mean()

    hessian = torch.func.hessian(loss)(torch.zeros(5, dtype=torch.float64))
    line = least_squares(features, target)
    assert line.sharpness == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-12)
    torch.testing.assert_close(line.eigenvectors @ line.eigenvalues.diag() @ line.eigenvectors.T, hessian)


def test_gradient_descent_turns_at_the_largest_stable_learning_rate() -> None:
    features, target = problem(30, 3, seed=2)
    line = least_squares(features, target)
    inputs = torch.cat([features, torch.ones(30, 1)], dim=1).double()

    def distance_after(factor: float) -> float:
        parameters = line.parameters + line.eigenvectors[:, -1]
        for _ in range(50):
            gradient = 2 / 30 * inputs.T @ (inputs @ parameters - target)
            parameters = parameters - factor * line.largest_stable_learning_rate * gradient
        return float((parameters - line.parameters).norm())

    assert distance_after(0.99) == pytest.approx(0.98**50, rel=1e-6)
    assert distance_after(1.01) == pytest.approx(1.02**50, rel=1e-6)


def test_a_constant_feature_leaves_the_optimum_finite() -> None:
    features, target = problem(20, 2, seed=3)
    features[:, 1] = 0.0
    line = least_squares(features, target)
    assert line.loss == pytest.approx(least_squares(features[:, :1], target).loss, rel=1e-12)
    assert torch.isfinite(line.parameters).all()


def test_rows_that_come_twice_hide_no_curvature() -> None:
    features, target = problem(6, 20, seed=7)
    line = least_squares(features.repeat(2, 1), target.repeat(2))
    assert line.loss == pytest.approx(0, abs=1e-24)
    torch.testing.assert_close(line.eigenvalues, least_squares(features, target).eigenvalues)


def test_many_rows_are_added_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features, target = problem(50, 2, seed=4)
    whole = least_squares(features, target)
    monkeypatch.setattr(sys.modules[least_squares.__module__], "ROWS_AT_ONCE", 7)
    parts = least_squares(features, target)
    torch.testing.assert_close(parts.parameters, whole.parameters)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)


def test_a_time_stamp_keeps_its_slope_next_to_its_intercept() -> None:
    when = 1_700_000_000 + torch.arange(240, dtype=torch.float64)[:, None]
    target = 0.05 + 0.004 * torch.arange(240, dtype=torch.float64) + 0.01 * torch.sin(torch.arange(240.0)).double()
    line, near = least_squares(when, target), least_squares(when - 1_700_000_000, target)
    assert line.loss == pytest.approx(near.loss, rel=1e-9)
    assert float(line.parameters[0]) == pytest.approx(float(near.parameters[0]), rel=1e-9)
    assert not line.is_complete  # float64 has no room for both curvatures
    assert near.is_complete


def test_more_features_than_rows_leave_no_loss_and_as_many_curvatures_as_rows() -> None:
    features, target = problem(12, 40, seed=5)
    line = least_squares(features, target)
    inputs = torch.cat([features, torch.ones(12, 1)], dim=1).double()
    assert line.loss == pytest.approx(0, abs=1e-24)
    torch.testing.assert_close(inputs @ line.parameters, target.double())
    expected = torch.linalg.eigvalsh(2 / 12 * inputs.T @ inputs)[-12:]
    torch.testing.assert_close(line.eigenvalues, expected)
    hessian = line.eigenvectors * line.eigenvalues @ line.eigenvectors.T
    torch.testing.assert_close(hessian, 2 / 12 * inputs.T @ inputs)


def test_too_many_curvatures_are_not_all_looked_for_but_the_optimum_and_the_largest_are_exact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    features, target = problem(90, 30, seed=6)
    whole = least_squares(features, target)
    monkeypatch.setattr(sys.modules[least_squares.__module__], "MOST_CURVATURES", 20)
    state = torch.get_rng_state()
    line = least_squares(features, target)
    assert torch.equal(state, torch.get_rng_state())
    assert not line.is_complete
    assert "Of 31 curvatures only the largest" in caplog.text
    assert line.loss == pytest.approx(whole.loss, rel=1e-12)
    assert line.sharpness == pytest.approx(whole.sharpness, rel=1e-6)


def test_with_weight_decay_gradient_descent_comes_to_rest_at_the_decayed_optimum() -> None:
    features, target = problem(40, 3, seed=8)
    line = least_squares(features, target).decayed(0.3)
    inputs = torch.cat([features, torch.ones(40, 1)], dim=1).double()
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=1 / line.sharpness, weight_decay=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        (inputs @ theta - target).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(theta.detach(), line.parameters)
    theta = theta.detach()
    objective = (inputs @ theta - target).square().mean() + 0.15 * theta.square().sum()
    assert line.loss == pytest.approx(float(objective), rel=1e-12)


@pytest.mark.parametrize("gap", [0.0, 1e-7])
def test_dependent_columns_have_numpys_optimum(gap: float) -> None:
    random = np.random.default_rng(0)
    kind = np.eye(3)[random.integers(0, 3, 200)]  # the three add up to the column of ones
    number = random.normal(size=200)
    features = np.column_stack([number, kind, number + gap * random.normal(size=200)])
    target = features @ [1.0, 2.0, 3.0, 4.0, 1 / (gap or 1)] + random.normal(size=200)
    with_ones = np.column_stack([features, np.ones(200)])
    error = ((with_ones @ np.linalg.lstsq(with_ones, target, rcond=None)[0] - target) ** 2).mean()
    for _ in range(5):  # torch's gelsy has another solution at each call
        line = least_squares(torch.from_numpy(features), torch.from_numpy(target))
        assert line.loss == pytest.approx(error, rel=1e-9)


def test_the_excess_is_the_loss_above_the_optimum_by_numpy_in_float64() -> None:
    features, target = problem(40, 3, seed=9)
    theta = torch.tensor([0.3, -2.0, 1.0, 0.5])
    error = features.double().numpy() @ theta[:3].double().numpy() + 0.5 - target.double().numpy()
    line = least_squares(features, target)
    assert line.excess(theta) == pytest.approx((error**2).mean() - line.loss, rel=1e-12)


def test_a_curvature_that_is_not_known_leaves_the_excess_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[least_squares.__module__], "MOST_CURVATURES", 20)
    assert least_squares(*problem(90, 30, seed=6)).excess(torch.zeros(31)) is None
