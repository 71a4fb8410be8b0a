import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from downslope.gradients.curvature import Eigenpair, Hessian, largest_eigenvalue


def network(seed: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """A small network's parameters, and its loss as a function of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs, target, *parameters = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(20, 3), (20, 1), (4, 3), (4,), (1, 4)]
    )

    def loss(weight: Tensor, bias: Tensor, output: Tensor) -> Tensor:
        return (torch.tanh(inputs @ weight.T + bias) @ output.T - target).square().mean()

    return [parameter.requires_grad_() for parameter in parameters], loss


def dense_hessian(loss: Callable[..., Tensor], parameters: list[Tensor]) -> Tensor:
    """The whole matrix, by torch.func in float64: another road than two backward passes."""
    sizes = [parameter.numel() for parameter in parameters]
    shapes = [parameter.shape for parameter in parameters]

    def of_vector(vector: Tensor) -> Tensor:
        pieces = vector.split(sizes)
        return loss(*(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)))

    return torch.func.hessian(of_vector)(torch.cat([p.detach().double().flatten() for p in parameters]))


def sharpness(loss: Tensor, parameters: list[Tensor], num_products: int = 100) -> Eigenpair:
    hessian = Hessian(loss, parameters)
    return largest_eigenvalue(hessian.product, hessian.random_direction(), num_products)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_products_are_those_of_the_dense_hessian(seed: int) -> None:
    parameters, loss = network(seed)
    hessian = Hessian(loss(*parameters), parameters)
    rows = torch.stack([hessian.product(row) for row in torch.eye(hessian.num_rows, dtype=torch.float64)])
    torch.testing.assert_close(rows, dense_hessian(loss, parameters), rtol=1e-9, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_largest_eigenvalue_is_that_of_eigvalsh(seed: int) -> None:
    parameters, loss = network(seed)
    expected = float(torch.linalg.eigvalsh(dense_hessian(loss, parameters))[-1])
    pair = sharpness(loss(*parameters), parameters)
    assert pair.value == pytest.approx(expected, rel=1e-9)
    assert pair.num_products == 20  # as many as there are parameters


def test_single_precision_costs_single_precision() -> None:
    parameters, loss = network(0, torch.float32)
    double, double_loss = network(0)
    expected = float(torch.linalg.eigvalsh(dense_hessian(double_loss, double))[-1])
    assert sharpness(loss(*parameters), parameters, 10).value == pytest.approx(expected, rel=1e-5)


def test_the_comparison_above_catches_an_eigenvalue_that_is_a_thousandth_off() -> None:
    parameters, loss = network(0)
    value = sharpness(loss(*parameters), parameters).value
    assert value * 1.001 != pytest.approx(value, rel=1e-5)


def test_the_sharpness_of_a_line_is_its_closed_form() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 4))
    inputs, weights = torch.tensor(rows), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    expected = np.linalg.norm(rows, 2) ** 2 * 2 / 30  # of (2/N)XᵀX
    assert sharpness((inputs @ weights - 1).square().mean(), [weights]).value == pytest.approx(expected, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    eigenvalues=st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    num_products=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_the_residual_bounds_the_distance_to_an_eigenvalue(
    eigenvalues: list[float], num_products: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double())
    spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
    matrix = rotation @ spectrum.diag() @ rotation.T
    start = torch.randn(len(eigenvalues), generator=generator).double()
    pair = largest_eigenvalue(lambda vector: matrix @ vector, start, num_products)
    rounding = 1e-11  # float64 at a norm of 100
    assert pair.num_products == min(num_products, len(eigenvalues))
    assert float((spectrum - pair.value).abs().min()) <= pair.residual + rounding
    assert float((matrix @ pair.vector - pair.value * pair.vector).norm()) == pytest.approx(pair.residual, abs=rounding)
    assert pair.value <= max(eigenvalues) + rounding


def test_the_largest_is_not_the_one_of_largest_magnitude() -> None:
    x, y = (torch.tensor(1.0, requires_grad=True) for _ in range(2))
    assert sharpness(x**2 / 2 - 50 * y**2, [x, y]).value == pytest.approx(1.0)
    assert sharpness(-(x**2) - 50 * y**2, [x, y]).value == pytest.approx(-2.0)


def test_a_start_at_another_eigenvector_is_left() -> None:
    matrix = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    pair = largest_eigenvalue(lambda vector: matrix @ vector, torch.tensor([1.0, 0.0, 0.0]), 3)
    assert pair.value == pytest.approx(3.0, rel=1e-5)


def test_warm_starts_follow_an_eigenvalue_that_overtakes_in_a_block_of_its_own() -> None:
    vector, values = torch.eye(20)[0], []
    for step in range(20):
        diagonal = torch.linspace(0.0, 1.0, 20)
        diagonal[0], diagonal[10] = 5.0, 2.0 + step / 2
        pair = largest_eigenvalue(lambda v, diagonal=diagonal: diagonal * v, vector, 3)
        vector = pair.vector
        values.append(pair.value)
    assert values[0] == pytest.approx(5.0, rel=1e-4)
    assert values[-1] == pytest.approx(11.5, rel=1e-4)


def test_a_warm_start_needs_few_products() -> None:
    parameters, loss = network(1)
    hessian = Hessian(loss(*parameters), parameters)
    exact = sharpness(loss(*parameters), parameters)
    cold = largest_eigenvalue(hessian.product, hessian.random_direction(), 2)
    warm = largest_eigenvalue(hessian.product, exact.vector, 2)
    assert warm.value == pytest.approx(exact.value, rel=1e-6)
    assert cold.value != pytest.approx(exact.value, rel=1e-2)


def test_frozen_unused_and_tied_parameters_have_no_rows_zero_rows_and_one_set() -> None:
    tied = torch.tensor([1.0, 2.0], requires_grad=True)
    unused, linear = torch.ones(3, requires_grad=True), torch.ones(1, requires_grad=True)
    hessian = Hessian((tied**3).sum() + linear.sum(), [tied, torch.ones(5), tied, unused, linear])
    assert hessian.num_rows == 6
    torch.testing.assert_close(hessian.product(torch.ones(6)), torch.tensor([6.0, 12.0, 0.0, 0.0, 0.0, 0.0]))


def test_a_flat_loss_has_no_curvature() -> None:
    x = torch.ones(3, requires_grad=True)
    for loss in (x.sum(), torch.tensor(1.0), (0 * x**2).sum()):
        pair = sharpness(loss, [x])
        assert (pair.value, pair.residual) == (0.0, 0.0)


def test_products_that_are_not_finite_give_nan() -> None:
    x = torch.full((3,), math.nan, requires_grad=True)
    assert math.isnan(sharpness((x**4).sum(), [x]).value)


def test_parameters_of_several_precisions_are_one_vector() -> None:
    x, y = (torch.ones(2, dtype=dtype, requires_grad=True) for dtype in (torch.float64, torch.bfloat16))
    pair = sharpness((x**2).sum() + 2 * (y.double() ** 2).sum(), [x, y])
    assert pair.vector.dtype == torch.float64
    assert pair.value == pytest.approx(4.0, rel=1e-2)  # products rounded to bfloat16's 8 bits


def test_no_grad_is_touched_and_no_random_number_drawn() -> None:
    parameters, loss = network(2)
    state = torch.get_rng_state()
    sharpness(loss(*parameters), parameters)
    assert all(parameter.grad is None for parameter in parameters)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_has_no_hessian_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        Hessian(torch.tensor(1.0), [torch.ones(2)])
    embedding = nn.Embedding(5, 2, sparse=True)
    with pytest.raises(ValueError, match="a gradient is sparse"):
        Hessian(embedding(torch.tensor([1, 2])).square().sum(), embedding.parameters())
