"""The data of the line: a table, split by seed, standardised by its training rows, in batches."""

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from downslope.gradients.least_squares import LeastSquares, least_squares
from downslope.tables.batches import Batches, ShuffledOrder
from downslope.tables.randomness import Stream, generator
from downslope.tables.standardization import Standardization, is_constant
from downslope.tables.synthetic import synthetic_table
from downslope.tables.table import Table, column_names, read_columns, read_table

log = logging.getLogger(__name__)

MIN_ROWS_PER_PART = 2  # R² needs two
ROWS_AT_ONCE = 65_536  # of a prediction


class TableData(LightningDataModule):
    """Rows of a CSV or Parquet file as training, validation and test part.

    Args:
        path: The file; see `downslope.tables.table.read_table`.
        target: The column to predict.
        features: The columns to predict it from; all others when None.
        batch_size: Rows a batch and process.
        seed: Decides the split and, with the epoch, the order of the training rows.
        standardize: Whether features and target are put into units of the training rows' spread.
        validation_fraction: Share of the rows that choose the best checkpoint.
        test_fraction: Share of the rows that are looked at once, at the end.

    Raises:
        ValueError: A setting is out of its range; later, where the rows are asked for: there are too few.
    """

    def __init__(
        self,
        path: str,
        target: str,
        features: Sequence[str] | None = None,
        *,
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
        self.path = path
        self.target = target
        self.features = features
        self.batch_size = batch_size
        self.seed = seed
        self.standardize = standardize
        self.fractions = (validation_fraction, test_fraction)

    @cached_property
    def table(self) -> Table:
        """All rows, read when they are first asked for."""
        return read_table(self.path, self.target, self.features)

    @cached_property
    def rows(self) -> dict[str, Any]:
        """The numbers of the rows of each part, which the seed decides."""
        num_rows = len(self.table)
        num_validation, num_test = (max(MIN_ROWS_PER_PART, round(num_rows * share)) for share in self.fractions)
        num_training = num_rows - num_validation - num_test
        if num_training < MIN_ROWS_PER_PART:
            raise ValueError(
                f"{self.table.name} must leave {MIN_ROWS_PER_PART} rows to train on beside {num_validation} for "
                f"validation and {num_test} for test, got {num_rows} rows."
            )
        order = generator(Stream.SPLIT, self.seed).permutation(num_rows)
        ends = [0, num_training, num_training + num_validation, num_rows]
        return {
            part: order[start:end] for part, start, end in zip(("train", "val", "test"), ends, ends[1:], strict=False)
        }

    @cached_property
    def parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Features and target of each part, in the units of the training rows."""
        features, target = self.table.features, self.table.target[:, None]
        training = features[self.rows["train"]]
        self.feature_names = self.table.feature_names
        units = Standardization.of if self.standardize else Standardization.none
        self.feature_units, self.target_units = units(training), units(target[self.rows["train"]])
        names = [name for name, same in zip(self.feature_names, is_constant(training), strict=True) if same]
        if names:
            log.warning("%s: constant in the training rows, so without use: %s.", self.table.name, ", ".join(names))
        if self.batch_size > len(training):
            text = "data.batch_size=%d is more than the %d training rows: every batch holds them all."
            log.warning(text, self.batch_size, len(training))
        return {
            part: (self.feature_units.apply(features[rows]), self.target_units.apply(target[rows])[:, 0])
            for part, rows in self.rows.items()
        }

    @property
    def num_features(self) -> int:
        """Columns that the model sees: conf leaves it to the data."""
        if not hasattr(self, "feature_names"):
            _ = self.parts
        return len(self.feature_names)

    @cached_property
    def least_squares(self) -> LeastSquares:
        """The loss of the line over all training rows in closed form."""
        return least_squares(*self.parts["train"])

    def description(self) -> str:
        """Says in a line what is learned from."""
        count = f"{self.num_features} feature{'s' * (self.num_features != 1)}"
        return f'{self.table.name}: {len(self.table):,} rows, {count}, target "{self.target}"'

    def fingerprint(self) -> str:
        """Says which numbers these are: a run is resumed on the same alone."""
        table = self.table
        return f"{', '.join(table.feature_names)} → {table.target_name}, {len(table)} rows, sha256 {table.digest[:12]}"

    def setup(self, stage: str) -> None:
        """Reads the rows, where they are trained on or looked at."""
        if stage != "predict":
            _ = self.parts

    def train_dataloader(self) -> Batches:
        """Shuffled anew each epoch."""
        return self._batches("train", ShuffledOrder(len(self.rows["train"]), self.seed))

    def val_dataloader(self) -> Batches:
        """In a fixed order."""
        return self._batches("val")

    def test_dataloader(self) -> Batches:
        """In a fixed order."""
        return self._batches("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor]]:
        """Serves the features of every row of the file, whatever else stands there; after `load_state_dict`."""
        available = column_names(self.path)
        if missing := [name for name in self.feature_names if name not in available]:
            raise ValueError(
                f"{self.path} must have the columns that the run was trained on, got no {', '.join(missing)}."
            )
        features = self.feature_units.apply(read_columns(self.path, self.feature_names))
        return DataLoader([(rows,) for rows in features.split(ROWS_AT_ONCE)], batch_size=None)  # type: ignore[arg-type]

    def _batches(self, part: str, sampler: ShuffledOrder | None = None) -> Batches:
        rank, num_processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Batches(*self.parts[part], self.batch_size, sampler, rank, num_processes)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries, so that predictions are made from names and in the user's units."""
        return {
            "feature_names": list(self.feature_names),
            "feature_units": self.feature_units.state_dict(),
            "target_units": self.target_units.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the columns and units of a run."""
        self.feature_names = tuple(map(str, state["feature_names"]))
        self.feature_units = Standardization.from_state_dict(state["feature_units"])
        self.target_units = Standardization.from_state_dict(state["target_units"])


class SyntheticData(TableData):
    """A line that is known, plus noise; see `synthetic_table` and `TableData` for the arguments."""

    def __init__(
        self, num_rows: int, num_features: int, noise: float, condition_number: float, seed: int, **settings: Any
    ) -> None:
        super().__init__("synthetic", "y", seed=seed, **settings)
        self.table = synthetic_table(num_rows, num_features, noise, condition_number, seed)
