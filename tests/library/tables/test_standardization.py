import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from downslope.tables.standardization import Standardization, is_constant

# Below 1e-290 the differences of two numbers run out of digits.
numbers = st.floats(-1e300, 1e300).filter(lambda value: value == 0 or abs(value) > 1e-290)
tables = arrays(np.float64, st.tuples(st.integers(2, 20), st.integers(1, 3)), elements=numbers)


@settings(max_examples=200, deadline=None)
@given(tables)
def test_columns_get_mean_0_and_deviation_1(values: np.ndarray) -> None:
    units = Standardization.of(values)
    standardized = units.apply(values).double().numpy()
    constant = is_constant(values)
    # A spread near the last bit of the values is rounding, of which nothing can be asked but that it stays finite.
    assume(bool((constant | (np.ptp(values, axis=0) > 1e-6 * np.abs(values).max(axis=0))).all()))
    np.testing.assert_allclose(standardized.mean(axis=0), 0.0, atol=1e-6)  # float32
    np.testing.assert_allclose(standardized.std(axis=0), np.where(constant, 0.0, 1.0), atol=1e-6)


def test_by_hand() -> None:
    units = Standardization.of(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert units.mean.tolist() == [2.0, 5.0]
    assert units.scale.tolist() == [1.0, 1.0]
    assert units.apply(np.array([[4.0, 6.0]])).tolist() == [[2.0, 1.0]]


def test_undo_gives_the_units_back() -> None:
    values = np.array([[10.0], [30.0], [70.0]])
    units = Standardization.of(values)
    np.testing.assert_allclose(units.undo(units.apply(values)), values, rtol=1e-6)  # float32


def test_the_state_is_plain_tensors() -> None:
    units = Standardization.of(np.array([[1.0], [2.0]]))
    again = Standardization.from_state_dict(units.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in units.state_dict().values())
    assert again.mean == units.mean
    assert again.scale == units.scale


def test_what_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit into float32"):
        Standardization.none(np.array([[1e39]])).apply(np.array([[1e39]]))


def test_values_that_float32_merges_are_one_warning_and_others_none(caplog: pytest.LogCaptureFixture) -> None:
    seconds = 1_700_000_000 + np.arange(240.0)
    many = np.random.default_rng(0).normal(size=240)
    Standardization.none(np.stack([seconds, many, seconds - seconds[0], np.full(240, 0.1)], axis=1))
    assert caplog.messages == [  # float32 has steps of 128 there
        "From 1700000000 to 1700000239 float32 leaves 3 of a column's 240 values: use `data.standardize=true`."
    ]
    Standardization.of(seconds[:, None])
    assert len(caplog.messages) == 1
