import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from downslope.tables.standardization import Moments, Standardization, Units

# Below 1e-290 the differences of two numbers run out of digits.
numbers = st.floats(-1e300, 1e300).filter(lambda value: value == 0 or abs(value) > 1e-290)
tables = arrays(np.float64, st.tuples(st.integers(2, 20), st.integers(1, 3)), elements=numbers)


def standardization(values: np.ndarray) -> Standardization:
    return Standardization.of(Moments.of(values), len(values))


@settings(max_examples=200, deadline=None)
@given(tables)
def test_columns_get_mean_0_and_deviation_1(values: np.ndarray) -> None:
    units = standardization(values)
    standardized = units.apply(values).double().numpy()
    constant = np.ptp(values, axis=0) == 0
    # A spread near the last bit of the values is rounding, of which nothing can be asked but that it stays finite.
    assume(bool((constant | (np.ptp(values, axis=0) > 1e-6 * np.abs(values).max(axis=0))).all()))
    np.testing.assert_allclose(standardized.mean(axis=0), 0.0, atol=1e-6)  # float32
    np.testing.assert_allclose(standardized.std(axis=0), np.where(constant, 0.0, 1.0), atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(tables, st.integers(1, 19))
def test_rows_that_come_some_at_a_time_are_measured_as_all_of_them(values: np.ndarray, size: int) -> None:
    parts = [Moments.of(values[first : first + size]) for first in range(0, len(values), size)]
    merged, whole = Moments.merged(parts), Moments.of(values)
    np.testing.assert_allclose(merged.mean, whole.mean, atol=1e-14)  # in units of the largest value
    np.testing.assert_allclose(merged.squares, whole.squares, rtol=1e-9, atol=1e-26)
    assert merged.least.tolist() == whole.least.tolist()
    assert merged.most.tolist() == whole.most.tolist()


def test_a_missing_cell_counts_as_the_mean_of_the_others() -> None:
    nan, columns = np.nan, np.array([[1.0, 2.0, 7.0], [0.0, 0.0, 0.0]]).T
    parts = [np.array([[nan, nan], [1.0, 0.0]]), np.array([[2.0, nan]]), np.array([[nan, 0.0], [7.0, 0.0], [nan, nan]])]
    units = Units.measured([(part, part[:, :1] * 0 + 1, None) for part in parts], standardize=True)
    assert units.means == pytest.approx(columns.mean(axis=0))
    assert units.features.scale == pytest.approx([np.sqrt(((columns[:, 0] - 10 / 3) ** 2).sum() / 6), 1.0])
    assert units.is_constant.tolist() == [False, True]


def test_by_hand() -> None:
    units = standardization(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert units.mean.tolist() == [2.0, 5.0]
    assert units.scale.tolist() == [1.0, 1.0]
    assert units.apply(np.array([[4.0, 6.0]])).tolist() == [[2.0, 1.0]]


def test_undo_gives_the_units_back() -> None:
    values = np.array([[10.0], [30.0], [70.0]])
    units = standardization(values)
    np.testing.assert_allclose(units.undo(units.apply(values)), values, rtol=1e-6)  # float32


def test_the_state_is_plain_tensors() -> None:
    units = standardization(np.array([[1.0], [2.0]]))
    again = Standardization.from_state_dict(units.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in units.state_dict().values())
    assert again.mean == units.mean
    assert again.scale == units.scale


def test_what_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit into float32"):
        Standardization.none(1).apply(np.array([[1e39]]))


def test_values_that_float32_merges_are_one_warning_and_others_none(caplog: pytest.LogCaptureFixture) -> None:
    seconds = 1_700_000_000 + np.arange(240.0)
    many = np.random.default_rng(0).normal(size=240)
    columns = np.stack([seconds, many, seconds - seconds[0], np.full(240, 0.1)], axis=1)
    Units.measured([(columns, columns[:, 1:2], None)], standardize=False)
    assert caplog.messages == [  # float32 has steps of 128 there
        "From 1700000000 to 1700000239 float32 keeps only 3 of a column's 240 values: use `data.standardize=true`."
    ]
    Units.measured([(columns, columns[:, :1], None)], standardize=True)
    assert len(caplog.messages) == 1
