import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.tables.synthetic import synthetic_table


@settings(max_examples=40, deadline=None)
@given(
    num_features=st.integers(1, 12),
    extra_rows=st.integers(2, 200),
    exponent=st.floats(0, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_condition_number_is_the_one_asked_for(
    num_features: int, extra_rows: int, exponent: float, seed: int
) -> None:
    table = synthetic_table(num_features + extra_rows, num_features, 0.1, 10**exponent, seed)
    eigenvalues = np.linalg.svd(table.features, compute_uv=False) ** 2 / len(table)
    np.testing.assert_allclose(eigenvalues[0], 1.0, rtol=1e-9)
    if num_features > 1:
        # Singular values carry √condition times the rounding error of the whitening.
        np.testing.assert_allclose(eigenvalues[0] / eigenvalues[-1], 10**exponent, rtol=1e-6)
    np.testing.assert_allclose(table.features.mean(axis=0), 0.0, atol=1e-12)


def test_without_noise_the_target_is_on_the_known_line() -> None:
    table = synthetic_table(num_rows=50, num_features=3, noise=0.0, condition_number=10.0, seed=1)
    inputs = np.column_stack([table.features, np.ones(50)])
    parameters = np.linalg.lstsq(inputs, table.target, rcond=None)[0]
    np.testing.assert_allclose(parameters, [*table.weights, table.bias], rtol=1e-10)


def test_the_noise_has_the_deviation_asked_for() -> None:
    table = synthetic_table(num_rows=20_000, num_features=2, noise=0.5, condition_number=1.0, seed=1)
    noise = table.target - table.features @ table.weights - table.bias
    assert noise.std() == pytest.approx(0.5, rel=0.02)  # 4 standard errors, 1/√(2N) each


def test_same_seed_same_table() -> None:
    first, second, other = (synthetic_table(20, 2, 0.1, 5.0, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.features, second.features)
    assert not np.array_equal(first.features, other.features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_features": 0}, "`num_features` must be"),
        ({"num_rows": 3}, "`num_rows` must be at least 4 with 2 features, got 3"),
        ({"noise": -1.0}, "`noise` must be"),
        ({"noise": float("nan")}, "`noise` must be"),
        ({"condition_number": 0.5}, "`condition_number` must be"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    possible = {"num_rows": 20, "num_features": 2, "noise": 0.1, "condition_number": 1.0, "seed": 0}
    with pytest.raises(ValueError, match=message):
        synthetic_table(**{**possible, **settings})
