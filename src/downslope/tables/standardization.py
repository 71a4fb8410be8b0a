"""Standardisation: features and target in units of the training rows' spread, and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downslope.tables.table import Array


@dataclass(frozen=True, eq=False)
class Standardization:
    """z = (x − mean) / scale, one mean and one scale above 0 a column."""

    mean: Array
    scale: Array

    @classmethod
    def of(cls, values: Array) -> "Standardization":
        """Measures mean and standard deviation (1/N) of each column; a constant column keeps scale 1."""
        magnitude = np.abs(values).max(axis=0)
        magnitude[magnitude == 0.0] = 1.0  # in these units neither squares nor sums can overflow
        mean = (values / magnitude).mean(axis=0) * magnitude
        scale = (values / magnitude).std(axis=0) * magnitude
        return cls(mean, np.where(is_constant(values) | (scale == 0.0), 1.0, scale))

    @classmethod
    def none(cls, values: Array) -> "Standardization":
        """Returns the one that changes nothing."""
        return cls(np.zeros(values.shape[1]), np.ones(values.shape[1]))

    def apply(self, values: Array) -> Tensor:
        """Returns the standardised values as float32, made a column at a time: no second float64 table.

        Raises:
            ValueError: A value does not fit into float32.
        """
        result = np.empty(values.shape, dtype=np.float32)
        with np.errstate(over="ignore"):
            for column in range(values.shape[1]):
                result[:, column] = (values[:, column] - self.mean[column]) / self.scale[column]
        if not np.isfinite(result).all():
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


def is_constant(values: Array) -> NDArray[np.bool_]:
    """Tells for each column whether all its values are the same."""
    constant: NDArray[np.bool_] = values.max(axis=0) == values.min(axis=0)
    return constant
