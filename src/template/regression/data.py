"""The data of the line: a table, split by seed, standardised by its training rows, in batches."""

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from downslope.gradients.least_squares import LeastSquares
from downslope.tables.batches import Batch
from downslope.tables.columns import Column
from downslope.tables.standardization import Units, filled
from downslope.tables.stored import StoredTable
from downslope.tables.synthetic import synthetic_table
from downslope.tables.table import Missing, Table, Text, read_features, read_table, split

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 65_536  # of a prediction


class TableData(LightningDataModule):
    """Rows of a CSV or Parquet file as training, validation and test part.

    Args:
        path: The file, or a pattern for several; see `downslope.tables.table.Reading` for this and the next nine.
        target, features, exclude, weight: Names of columns.
        text, max_values, missing, decimal, in_memory: How their cells become numbers, and where these are kept.
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
        target: str | Sequence[str],
        features: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        weight: str | float | None = None,
        text: Text = "one_hot",
        max_values: int = 50,
        missing: Missing = "drop",
        decimal: str | None = None,
        in_memory: bool | Literal["auto"] = "auto",
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
        self.target_names = [str(name) for name in (target if isinstance(target, list | tuple) else [target])]
        self.reading: dict[str, Any] = {"features": features, "exclude": exclude, "weight": weight, "text": text}
        self.reading |= {"max_values": max_values, "missing": missing, "decimal": decimal, "in_memory": in_memory}
        self.batch_size = batch_size
        self.seed = seed
        self.standardize = standardize
        self.fractions = (validation_fraction, test_fraction)

    @cached_property
    def table(self) -> Table | StoredTable:
        """All rows, read when they are first asked for."""
        return read_table(self.path, self.target_names, seed=self.seed, **self.reading)

    @cached_property
    def parts(self) -> dict[str, Any]:
        """Features, target and, where there is one, weight of each part, in the units of the training rows."""
        rows = split(self.table, self.seed, self.fractions)
        self.feature_names, self.columns = self.table.feature_names, self.table.columns
        self.units = Units.measured(self.table.chunks(rows["train"]), self.standardize)
        if useless := [name for name, same in zip(self.feature_names, self.units.is_constant, strict=True) if same]:
            log.warning("%s: constant in the training rows, so without use: %s.", self.table.name, ", ".join(useless))
        return {part: self.table.part(each, self.units) for part, each in rows.items()}

    @property
    def num_features(self) -> int:
        """Columns that the model sees: conf leaves it to the data."""
        if not hasattr(self, "feature_names"):
            _ = self.parts
        return len(self.feature_names)

    @property
    def num_targets(self) -> int:
        """Numbers that the model predicts."""
        return len(self.target_names)

    @cached_property
    def least_squares(self) -> LeastSquares | None:
        """The loss of the line over all training rows in closed form; None for several targets."""
        return self.parts["train"].least_squares() if self.num_targets == 1 else None

    def description(self) -> str:
        """Says in a line what is learned from."""
        count = f"{self.num_features} feature{'s' * (self.num_features != 1)}"
        notes = f" ({'; '.join(self.table.notes)})" if self.table.notes else ""
        return f'{self.table.name}: {len(self.table):,} rows, {count}, target "{self.table.target_name}"{notes}'

    def fingerprint(self) -> str:
        """Says which numbers these are: a run is resumed on the same alone."""
        table = self.table
        return f"{', '.join(table.feature_names)} → {table.target_name}, {len(table)} rows, sha256 {table.digest}"

    def setup(self, stage: str) -> None:
        """Reads the rows, where they are trained on or looked at."""
        if stage != "predict":
            _ = self.parts

    def train_dataloader(self) -> Iterable[Batch]:
        """Shuffled anew each epoch; with the Trainer's `overfit_batches` as they stand: the same rows each time."""
        is_fixed = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        return self._batches("train", None if is_fixed else self.seed)

    def val_dataloader(self) -> Iterable[Batch]:
        """In a fixed order."""
        return self._batches("val")

    def test_dataloader(self) -> Iterable[Batch]:
        """In a fixed order."""
        return self._batches("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor]]:
        """Serves the features of every row of the file, whatever else stands there; after `load_state_dict`."""
        values = read_features(self.path, self.columns, self.reading["missing"], self.reading["decimal"])
        if self.reading["missing"] == "mean":
            values = filled(values, self.units.means)
        features = self.units.features.apply(values)
        return DataLoader([(rows,) for rows in features.split(ROWS_AT_ONCE)], batch_size=None)  # type: ignore[arg-type]

    def _batches(self, part: str, seed: int | None = None) -> Iterable[Batch]:
        rank, num_processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self.parts[part].batches(self.batch_size, seed, rank, num_processes)  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries, so that predictions are made from names and in the user's units."""
        return {
            "feature_names": list(self.feature_names),
            "columns": [column.state_dict() for column in self.columns],
            **self.units.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the columns and units of a run."""
        self.feature_names = tuple(map(str, state["feature_names"]))
        self.columns = tuple(Column.from_state_dict(column) for column in state["columns"])
        self.units = Units.from_state_dict(state)


class SyntheticData(TableData):
    """A line that is known, plus noise; see `synthetic_table` and `TableData` for the arguments."""

    def __init__(
        self, num_rows: int, num_features: int, noise: float, condition_number: float, seed: int, **settings: Any
    ) -> None:
        super().__init__("synthetic", "y", seed=seed, **settings)
        self.table = synthetic_table(num_rows, num_features, noise, condition_number, seed)
