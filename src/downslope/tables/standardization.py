"""Standardisation: features and target in units of the training rows' spread, and back."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.tables.columns import Array

Rows = tuple[Array, Array, Array | None]  # features, target (a column a target) and weight of some rows

log = logging.getLogger(__name__)

FEW_STEPS = 10_000  # of float32 within a column's range: more are enough for any line, though some values may merge


@dataclass(frozen=True, eq=False)
class Standardization:
    """z = (x − mean) / scale, one mean and one scale above 0 a column."""

    mean: Array
    scale: Array
    constant: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, values: Array) -> "Standardization":
        """Measures mean and standard deviation (1/N) of each column; a constant column keeps scale 1."""
        return cls.measured(lambda: [values])

    @classmethod
    def measured(cls, chunks: Callable[[], Iterable[Array]]) -> "Standardization":
        """Measures as `of` does, of rows that come some at a time, whenever `chunks` is called."""
        extremes = [(len(rows), rows.min(axis=0), rows.max(axis=0)) for rows in chunks()]
        num_rows = sum(count for count, _, _ in extremes)
        least, most = np.min([low for _, low, _ in extremes], 0), np.max([high for _, _, high in extremes], 0)
        magnitude = np.maximum(np.abs(least), np.abs(most))
        magnitude[magnitude == 0.0] = 1.0  # in these units neither squares nor sums can overflow
        mean = sum((rows / magnitude).sum(axis=0) for rows in chunks()) / num_rows
        squares = sum(np.square(rows / magnitude - mean).sum(axis=0) for rows in chunks())
        scale = np.sqrt(squares / num_rows) * magnitude
        return cls(mean * magnitude, np.where((least == most) | (scale == 0.0), 1.0, scale), least == most)

    @classmethod
    def none(cls, values: Array) -> "Standardization":
        """Returns the one that changes nothing; where float32 cannot tell a column's values apart, one warning."""
        _warn_of_merged(values)
        return cls(np.zeros(values.shape[1]), np.ones(values.shape[1]), is_constant(values))

    def apply(self, values: Array) -> Tensor:
        """Returns the standardised values as float32, made a column at a time: no second float64 table.

        Raises:
            ValueError: A value does not fit into float32.
        """
        result = np.empty(values.shape, dtype=np.float32)
        with np.errstate(over="ignore"):
            for column in range(values.shape[1]):
                result[:, column] = (values[:, column] - self.mean[column]) / self.scale[column]
        if np.isinf(result).any():  # what is missing stays so
            raise ValueError(
                "Values beyond 3e38 do not fit into float32: use `data.standardize=true`, or leave such rows out."
            )
        return torch.from_numpy(result)

    def undo(self, values: Tensor) -> Array:
        """Returns standardised values in their own units again, as float64."""
        return values.double().cpu().numpy() * self.scale + self.mean

    def state_dict(self) -> dict[str, Tensor]:
        """Returns mean and scale as tensors, which load with `weights_only=True`."""
        return {"mean": torch.from_numpy(self.mean), "scale": torch.from_numpy(self.scale)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Standardization":
        """Returns what `state_dict` was taken of."""
        return cls(state["mean"].numpy(), state["scale"].numpy())


@dataclass(frozen=True, eq=False)
class Units:
    """In what features, target and weight are given to a model: all measured on the training rows.

    Attributes:
        means: Of each feature, which missing cells become.
        features: Its units.
        target: Its units, a column a target.
        weight: Mean of the weights, which becomes 1.
    """

    means: Array
    features: Standardization
    target: Standardization
    weight: float = 1.0

    @classmethod
    def measured(cls, chunks: Callable[[], Iterable[Rows]], standardize: bool) -> "Units":
        """Measures the training rows, which come some at a time whenever `chunks` is called."""
        means = _means(chunks)
        of = Standardization.measured if standardize else lambda each: Standardization.none(next(iter(each())))
        features = of(lambda: (filled(inputs, means) for inputs, _, _ in chunks()))
        sums = [(len(weight), weight.sum()) for _, _, weight in chunks() if weight is not None]
        weight = sum(total for _, total in sums) / sum(count for count, _ in sums) if sums else 1.0
        return cls(means, features, of(lambda: (outputs for _, outputs, _ in chunks())), float(weight))

    def apply(self, features: Array, target: Array, weight: Array | None) -> tuple[Tensor, ...]:
        """Returns features, target and, where there is one, weight as a batch of float32."""
        inputs, outputs = self.features.apply(filled(features, self.means)), self.target.apply(target)
        outputs = outputs[:, 0] if outputs.shape[1] == 1 else outputs
        if weight is None:
            return inputs, outputs
        return inputs, outputs, torch.from_numpy(weight / self.weight).float().view(-1, *[1] * (outputs.dim() - 1))

    @property
    def is_constant(self) -> NDArray[np.bool_]:
        """Tells for each feature whether all training rows have the same."""
        assert self.features.constant is not None
        return self.features.constant

    def state_dict(self) -> dict[str, Any]:
        """Returns what predictions need as tensors."""
        units = {"feature_units": self.features.state_dict(), "target_units": self.target.state_dict()}
        return {"means": torch.from_numpy(self.means), **units}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Units":
        """Returns what `state_dict` was taken of."""
        features, target = (Standardization.from_state_dict(state[name]) for name in ("feature_units", "target_units"))
        return cls(state["means"].numpy(), features, target)


def filled(values: Array, instead: Array) -> Array:
    """Returns the values, with those of `instead`, one a column, where a cell is missing."""
    return np.where(np.isnan(values), instead, values) if np.isnan(values).any() else values


def _means(chunks: Callable[[], Iterable[Rows]]) -> Array:
    """The mean of each feature over the cells that are not missing."""
    totals = [(np.nansum(features, axis=0), (~np.isnan(features)).sum(axis=0)) for features, _, _ in chunks()]
    total, count = (np.sum(each, axis=0) for each in zip(*totals, strict=True))
    return np.asarray(total / np.maximum(count, 1))


def is_constant(values: Array) -> NDArray[np.bool_]:
    """Tells for each column whether all its values are the same."""
    constant: NDArray[np.bool_] = values.max(axis=0) == values.min(axis=0)
    return constant


def _warn_of_merged(values: Array) -> None:
    """A time stamp in seconds, as it is, has steps of two minutes in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        step = np.spacing(np.abs(values).max(axis=0).astype(np.float32))
        narrow = np.flatnonzero(np.ptp(values, axis=0) < FEW_STEPS * step)
    for column in values.T[narrow]:
        distinct, left = np.unique(column), np.unique(column.astype(np.float32))
        if len(left) < len(distinct):
            text = "From %.12g to %.12g float32 leaves %d of a column's %d values: use `data.standardize=true`."
            log.warning(text, distinct[0], distinct[-1], len(left), len(distinct))
