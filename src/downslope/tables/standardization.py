"""Standardisation: features and target in units of the training rows' spread, and back."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.tables.columns import Array

Rows = tuple[Array, Array, Array | None]  # features, target (a column a target) and weight of some rows

log = logging.getLogger(__name__)

ROWS = 4096  # that are standardised at once: they stay in the processor's cache
FEW_STEPS = 10_000  # of float32 within a column's range: more are enough for any line, though some values may merge


class Moments(NamedTuple):
    """Of the columns of some rows, without missing cells; mean and squares in units of `magnitude`: none overflows.

    Attributes:
        num_cells: How many.
        magnitude: Of the one farthest from 0.
        mean: Their mean.
        squares: The sum of the squares of what they are off it.
        least: The smallest.
        most: The largest.
    """

    num_cells: Array
    magnitude: Array
    mean: Array
    squares: Array
    least: Array
    most: Array

    @classmethod
    def of(cls, values: Array) -> "Moments":
        """Measures rows."""
        num_cells = np.isfinite(values).sum(axis=0).astype(np.float64)
        least, most = np.fmin.reduce(values), np.fmax.reduce(values)
        magnitude = np.nan_to_num(np.fmax(np.abs(least), np.abs(most)))
        scaled = values / _above_zero(magnitude)
        mean = np.nansum(scaled, axis=0) / np.maximum(num_cells, 1)
        scaled -= mean
        return cls(num_cells, magnitude, mean, np.nansum(np.square(scaled, out=scaled), axis=0), least, most)

    @classmethod
    def merged(cls, parts: Sequence["Moments"]) -> "Moments":
        """Returns those of all rows: x̄ = Σ nᵢx̄ᵢ/n, and S = Σ Sᵢ + nᵢ(x̄ᵢ − x̄)².

        Reference: Chan, Golub and LeVeque (1983), Algorithms for computing the sample variance.
        """
        num_cells, magnitude, mean, squares, least, most = map(np.stack, zip(*parts, strict=True))
        largest = magnitude.max(axis=0)
        unit = magnitude / _above_zero(largest)
        mean = mean * unit
        total = (num_cells / np.maximum(num_cells.sum(axis=0), 1) * mean).sum(axis=0)
        squares = (squares * unit**2 + num_cells * (mean - total) ** 2).sum(axis=0)
        return cls(num_cells.sum(axis=0), largest, total, squares, np.fmin.reduce(least), np.fmax.reduce(most))


def _above_zero(values: Array) -> Array:
    return np.where(values > 0, values, 1.0)


@dataclass(frozen=True, eq=False)
class Standardization:
    """z = (x − mean) / scale, one mean and one scale above 0 a column."""

    mean: Array
    scale: Array

    @classmethod
    def of(cls, moments: Moments, num_rows: int) -> "Standardization":
        """Makes it of mean and deviation (1/N), where a missing cell is the mean; a constant column keeps scale 1."""
        scale = np.sqrt(moments.squares / num_rows) * moments.magnitude
        return cls(moments.mean * moments.magnitude, np.where(moments.least < moments.most, _above_zero(scale), 1.0))

    @classmethod
    def none(cls, num_columns: int) -> "Standardization":
        """Returns the one that changes nothing."""
        return cls(np.zeros(num_columns), np.ones(num_columns))

    def apply(self, values: Array) -> Tensor:
        """Returns the standardised values as float32, made some rows at a time: no second float64 table.

        Raises:
            ValueError: A value does not fit into float32.
        """
        result = np.empty(values.shape, dtype=np.float32)
        with np.errstate(over="ignore"):
            for start in range(0, len(values), ROWS):
                rows = slice(start, start + ROWS)
                np.divide(values[rows] - self.mean, self.scale, out=result[rows], casting="same_kind")
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
        is_constant: For each feature whether all training rows have the same; empty in a stored run's.
    """

    means: Array
    features: Standardization
    target: Standardization
    weight: float = 1.0
    is_constant: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))

    @classmethod
    def measured(cls, chunks: Iterable[Rows], standardize: bool) -> "Units":
        """Measures the training rows, which come some at a time, in one pass."""
        parts: tuple[list[Moments], list[Moments]] = [], []
        num_rows, weight = 0, 0.0
        for *columns, weights in chunks:
            for moments, values in zip(parts, columns, strict=True):
                if not standardize and not num_rows:
                    _warn_of_merged(values)
                moments.append(Moments.of(values))
            num_rows += len(columns[1])
            weight += 0.0 if weights is None else float(weights.sum())
        features, target = map(Moments.merged, parts)
        inputs, outputs = (Standardization.of(each, num_rows) for each in (features, target))
        means = inputs.mean
        if not standardize:
            inputs, outputs = (Standardization.none(len(each.mean)) for each in (features, target))
        return cls(means, inputs, outputs, weight / num_rows if weight else 1.0, features.least == features.most)

    def apply(self, features: Array, target: Array, weight: Array | None) -> tuple[Tensor, ...]:
        """Returns features, target and, where there is one, weight as a batch of float32."""
        inputs, outputs = self.features.apply(filled(features, self.means)), self.target.apply(target)
        outputs = outputs[:, 0] if outputs.shape[1] == 1 else outputs
        if weight is None:
            return inputs, outputs
        return inputs, outputs, torch.from_numpy(weight / self.weight).float().view(-1, *[1] * (outputs.dim() - 1))

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


def _warn_of_merged(values: Array) -> None:
    """A time stamp in seconds, as it is, has steps of two minutes in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        step = np.spacing(np.abs(values).max(axis=0).astype(np.float32))
        narrow = np.flatnonzero(np.ptp(values, axis=0) < FEW_STEPS * step)
    for column in values.T[narrow]:
        distinct, left = np.unique(column), np.unique(column.astype(np.float32))
        if len(left) < len(distinct):
            text = "From %.12g to %.12g float32 keeps only %d of a column's %d values: use `data.standardize=true`."
            log.warning(text, distinct[0], distinct[-1], len(left), len(distinct))
