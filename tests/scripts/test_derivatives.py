import sys
from typing import Any

import derivatives
import pytest
import torch
from derivatives import (
    METHODS,
    MeanSquaredError,
    best_step,
    forward_mode,
    numeric,
    reverse_mode,
    symbolic,
    symbolic_gradient,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def problem(num_parameters: int, num_rows: int = 5, seed: int = 0) -> tuple[MeanSquaredError, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, num_parameters - 1, generator=generator, dtype=torch.float64)
    target = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return MeanSquaredError(features, target), torch.randn(num_parameters, generator=generator).double()


def test_all_four_give_the_gradient_worked_out_by_hand() -> None:
    # Predictions 2, 4, 6 for 3, 3, 9: residuals −1, 1, −3; ∂w = (2/3)(−1·1 + 1·2 − 3·3), ∂b = (2/3)(−3).
    loss = MeanSquaredError(
        torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64),
        torch.tensor([3.0, 3.0, 9.0], dtype=torch.float64),
    )
    place = torch.tensor([2.0, 0.0], dtype=torch.float64)
    for name, method in METHODS.items():
        expected = torch.tensor([-16 / 3, -2.0], dtype=torch.float64)
        # central differences of a parabola have no truncation: rounding ε/h = 4e-11 is left
        torch.testing.assert_close(method(loss, place), expected, rtol=0, atol=1e-9, msg=name)


@settings(max_examples=20, deadline=None)
@given(num_parameters=st.integers(1, 12), num_rows=st.integers(1, 9), seed=st.integers(0, 1000))
def test_all_four_agree_at_any_size(num_parameters: int, num_rows: int, seed: int) -> None:
    loss, place = problem(num_parameters, num_rows, seed)
    inputs = torch.cat([loss.features, torch.ones(num_rows, 1, dtype=torch.float64)], dim=1)
    expected = 2 / num_rows * inputs.T @ (inputs @ place - loss.target)
    for name, method in METHODS.items():
        found = method(loss, place)
        # ten digits for the numeric one, more for the others
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8, msg=name)
        assert not found.requires_grad


def test_symbolic_is_what_sympy_finds_element_by_element() -> None:
    import sympy

    loss, place = problem(num_parameters=3, num_rows=4)
    symbols = sympy.symbols("w1 w2 b")
    rows = zip(loss.features.tolist(), loss.target.tolist(), strict=True)
    formula = sum((row[0] * symbols[0] + row[1] * symbols[1] + symbols[2] - y) ** 2 for row, y in rows) / 4
    here = dict(zip(symbols, place.tolist(), strict=True))
    expected = [float(sympy.diff(formula, symbol).subs(here)) for symbol in symbols]
    torch.testing.assert_close(symbolic(loss, place), torch.tensor(expected, dtype=torch.float64))


def test_symbolic_is_generated_from_the_loss() -> None:
    import sympy

    names = {str(symbol) for symbol in symbolic_gradient().free_symbols}
    assert {"Z", "y", "θ", "N"} <= names
    assert isinstance(symbolic_gradient(), sympy.MatrixExpr)


def test_symbolic_refuses_what_has_no_formula() -> None:
    with pytest.raises(TypeError, match="SymPy needs the formula"):
        symbolic(lambda parameters: parameters.sum(), torch.ones(2))


def test_without_sympy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sympy", None)
    derivatives.symbolic_gradient.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'downslope\[symbolic\]'"):
        symbolic_gradient()


@pytest.mark.parametrize("method", [numeric, forward_mode, reverse_mode])
def test_any_function_of_a_vector_has_a_gradient(method: Any) -> None:
    place = torch.tensor([0.3, -2.0], dtype=torch.float64)
    found = method(lambda x: torch.sin(x[0]) * x[1] ** 3, place)
    expected = torch.stack([torch.cos(place[0]) * place[1] ** 3, 3 * torch.sin(place[0]) * place[1] ** 2])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_numeric_error_has_its_valley_near_the_third_root_of_epsilon() -> None:
    place = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
    steps = [10.0**-power for power in range(1, 13)]
    found = {step: numeric(lambda x: x.exp().sum(), place, step) for step in steps}
    errors = {step: float((gradient / place.exp() - 1).abs().max()) for step, gradient in found.items()}
    best = min(errors, key=lambda step: errors[step])
    assert best_step(torch.float64) / 10 < best < best_step(torch.float64) * 10
    assert errors[1e-1] > 1e3 * errors[best]  # truncation
    assert errors[1e-12] > 1e3 * errors[best]  # rounding
    # to the right of the valley the error is h²/6 of the third derivative, with h = 0.01 · max(1, θ)
    assert errors[1e-2] == pytest.approx((0.01 * 1.5) ** 2 / 6, rel=1e-3)


def test_numeric_leaves_the_place_alone() -> None:
    place = torch.tensor([1.0, 2.0], requires_grad=True)
    found = numeric(lambda x: x.sum(), place)
    assert place.tolist() == [1.0, 2.0]
    assert not found.requires_grad


def test_number_of_evaluations_is_the_number_that_is_claimed() -> None:
    calls = []

    def function(parameters: Tensor) -> Tensor:
        calls.append(1)
        return parameters.square().sum()

    expected = {numeric: 2 * 7, forward_mode: 7, reverse_mode: 1}
    for method, num_calls in expected.items():
        calls.clear()
        method(function, torch.ones(7))
        assert len(calls) == num_calls


@pytest.mark.parametrize(("method", "passes"), [(numeric, 14), (forward_mode, 7), (reverse_mode, 1)])
def test_numeric_and_forward_take_passes_with_the_parameters_and_reverse_one(method, passes: int) -> None:
    evaluations = []

    def function(parameters: torch.Tensor) -> torch.Tensor:
        evaluations.append(parameters)
        return (parameters**2).sum()

    method(function, torch.arange(7.0))
    assert len(evaluations) == passes
