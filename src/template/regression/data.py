"""The data as Lightning takes it: a table, split by seed, standardised by its training rows, in batches."""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from lightning import LightningDataModule
from torch import Tensor

from downslope.gradients.least_squares import LeastSquares, least_squares
from downslope.tables.batches import Batches, ShuffledOrder
from downslope.tables.randomness import Stream, generator
from downslope.tables.standardization import Standardization, is_constant
from downslope.tables.synthetic import synthetic_table
from downslope.tables.table import Table, read_table

log = logging.getLogger(__name__)

MIN_ROWS_PER_PART = 2  # R² needs two


class DataModule(LightningDataModule):
    """Rows of a table as training, validation and test part.

    Args:
        table: What to learn from.
        batch_size: Rows a batch and process.
        seed: Decides the split and, with the epoch, the order of the training rows.
        standardize: Whether features and target are put into units of the training rows' spread.
        validation_fraction: Share of the rows that choose the best checkpoint.
        test_fraction: Share of the rows that are looked at once, at the end.

    Raises:
        ValueError: A setting is out of its range, or the table has too few rows.
    """

    def __init__(
        self,
        table: Table,
        batch_size: int,
        seed: int,
        standardize: bool = True,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a whole number of at least 1, got {batch_size!r}.")
        for name, fraction in (("validation", validation_fraction), ("test", test_fraction)):
            if not 0 < fraction < 1:
                raise ValueError(f"`{name}_fraction` must be between 0 and 1, got {fraction!r}.")
        num_validation = max(MIN_ROWS_PER_PART, round(len(table) * validation_fraction))
        num_test = max(MIN_ROWS_PER_PART, round(len(table) * test_fraction))
        num_training = len(table) - num_validation - num_test
        if num_training < MIN_ROWS_PER_PART:
            raise ValueError(
                f"{table.name} must leave {MIN_ROWS_PER_PART} rows to train on beside {num_validation} for "
                f"validation and {num_test} for test, got {len(table)} rows."
            )
        self.table = table
        self.batch_size = batch_size
        self.seed = seed
        self.standardize = standardize
        order = generator(Stream.SPLIT, seed).permutation(len(table))
        self.rows = {
            "train": order[:num_training],
            "val": order[num_training : num_training + num_validation],
            "test": order[num_training + num_validation :],
        }
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_file(cls, path: str, target: str, features: Sequence[str] | None = None, **settings: Any) -> "DataModule":
        """Reads a CSV or Parquet file; see `read_table` and the class for the arguments."""
        return cls(read_table(path, target, features), **settings)

    @classmethod
    def synthetic(
        cls,
        num_rows: int,
        num_features: int,
        noise: float,
        condition_number: float,
        seed: int,
        **settings: Any,
    ) -> "DataModule":
        """Makes a problem whose answer is known; see `synthetic_table` and the class for the arguments."""
        table = synthetic_table(num_rows, num_features, noise, condition_number, seed)
        return cls(table, seed=seed, **settings)

    @property
    def num_features(self) -> int:
        """Columns that the model sees."""
        return len(self.table.feature_names)

    def setup(self, stage: str) -> None:
        """Splits and standardises, once."""
        if self.parts:
            return
        features, target = self.table.features, self.table.target[:, None]
        training_features = features[self.rows["train"]]
        if self.standardize:
            self.feature_units = Standardization.of(training_features)
            self.target_units = Standardization.of(target[self.rows["train"]])
        else:
            self.feature_units = Standardization.none(self.num_features)
            self.target_units = Standardization.none(1)
        self.parts = {
            part: (self.feature_units.apply(features[rows]), self.target_units.apply(target[rows])[:, 0])
            for part, rows in self.rows.items()
        }
        self._warn(is_constant(training_features))

    @cached_property
    def least_squares(self) -> LeastSquares:
        """The loss over all training rows in closed form; after `setup`."""
        return least_squares(*self.parts["train"])

    def _warn(self, constant: "np.typing.NDArray[np.bool_]") -> None:
        names = [name for name, same in zip(self.table.feature_names, constant, strict=True) if same]
        if names:
            log.warning("%s: constant in the training rows, so without use: %s.", self.table.name, ", ".join(names))
        if self.batch_size > len(self.rows["train"]):
            log.warning(
                "data.batch_size=%d is more than the %d training rows: every batch holds them all.",
                self.batch_size,
                len(self.rows["train"]),
            )

    def train_dataloader(self) -> Batches:
        """Shuffled anew each epoch."""
        return self._batches("train", ShuffledOrder(len(self.rows["train"]), self.seed))

    def val_dataloader(self) -> Batches:
        """In a fixed order."""
        return self._batches("val")

    def test_dataloader(self) -> Batches:
        """In a fixed order."""
        return self._batches("test")

    def _batches(self, part: str, sampler: ShuffledOrder | None = None) -> Batches:
        rank, num_processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Batches(*self.parts[part], self.batch_size, sampler, rank, num_processes)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries, so that predictions are made from names and in the user's units."""
        return {
            "feature_names": list(self.table.feature_names),
            "target_name": self.table.target_name,
            "num_rows": len(self.table),
            "digest": self.table.digest,
            "feature_units": self.feature_units.state_dict(),
            "target_units": self.target_units.state_dict(),
        }
