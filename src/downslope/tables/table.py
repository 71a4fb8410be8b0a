"""A table of numbers out of the user's file: what is left out is said, and a refusal names the cell."""

import functools
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from downslope.tables.batches import Part
from downslope.tables.columns import EXACT, Array, Column, Survey, WrongCellError, encode
from downslope.tables.files import TableFile, open_table, resolve
from downslope.tables.randomness import Stream, generator
from downslope.tables.standardization import Rows, Units
from downslope.tables.stored import WINDOW, Store, StoredTable, free_memory

log = logging.getLogger(__name__)

INDEX = re.compile(r"rownames|Unnamed: \d+|__index_level_\d+__")  # row numbers, as R and pandas write them
CLASSES = "make new NAME=…, with experiment=digits as the pattern."
FEW_VALUES = 10  # of a target of whole numbers: they may be classes
ROWS_AT_ONCE = 65_536
LEAST_ROWS = 2  # of a part: R² needs two
SHARE = 0.3  # of the memory that is free, for a table in it: standardised, it takes half as much again

Missing = Literal["drop", "mean", "refuse"]
Text = Literal["one_hot", "refuse"]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of numbers with names; read-only.

    Attributes:
        name: Where it came from, for people.
        features: One row a sample, one column a feature; NaN where a cell is to be filled with the mean.
        target: One value a row; of several targets, a column each.
        feature_names: One name a column of `features`.
        target_name: What is predicted.
        weight: What each row counts in the loss; None where all count 1.
        columns: How the file's columns became features.
        notes: What was found and left out, for people.
    """

    name: str
    features: Array
    target: Array
    feature_names: tuple[str, ...]
    target_name: str
    weight: Array | None = None
    columns: tuple[Column, ...] = ()
    notes: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for values in (self.features, self.target, self.weight):
            if values is not None:
                values.flags.writeable = False
        if not self.columns:
            object.__setattr__(self, "columns", tuple(Column(name) for name in self.feature_names))

    def __len__(self) -> int:
        return len(self.target)

    def split(self, seed: int, fractions: tuple[float, float]) -> dict[str, NDArray[np.int64]]:
        """Returns the numbers of the rows to train on, to validate and to test with, which the seed decides."""
        num_rows = len(self)
        num_validation, num_test = (max(LEAST_ROWS, round(num_rows * share)) for share in fractions)
        num_training = max(0, num_rows - num_validation - num_test)
        order = generator(Stream.SPLIT, seed).permutation(num_rows)
        train, val, test = np.split(order, [num_training, num_training + num_validation])
        return {"train": train, "val": val, "test": test}

    def chunks(self, rows: NDArray[np.int64]) -> Iterator[Rows]:
        """Yields rows, some at a time."""
        target = self.target.reshape(len(self), -1)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chosen = rows[start : start + ROWS_AT_ONCE]
            yield self.features[chosen], target[chosen], None if self.weight is None else self.weight[chosen]

    def part(self, rows: NDArray[np.int64], units: Units) -> Part:
        """Returns rows in the units of a model."""
        batches = [units.apply(*chunk) for chunk in self.chunks(rows)]
        return Part(*(torch.cat(each) for each in zip(*batches, strict=True)))

    @functools.cached_property
    def digest(self) -> str:
        """The beginning of the SHA-256 of every cell: whether two tables hold the same numbers."""
        digest = hashlib.sha256()
        for values in (self.features, self.target, self.weight):
            for start in range(0, len(self) if values is not None else 0, ROWS_AT_ONCE):
                digest.update(values[start : start + ROWS_AT_ONCE].tobytes())  # type: ignore[index]
        return digest.hexdigest()[:12]


class Rules(NamedTuple):
    """How columns of text and missing cells are dealt with."""

    text: Text
    max_values: int
    missing: Missing


@dataclass(frozen=True)
class Plan:
    """How the columns that are used become numbers.

    Attributes:
        features: The columns to predict from.
        others: Targets and weight.
        numbers: Names of those that the reader turns into numbers by itself.
        notes: What is left out and changed, for people.
    """

    features: list[Column]
    others: list[Column]
    numbers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Numbers a row."""
        return sum(len(column.feature_names) for column in (*self.features, *self.others))


def read_table(
    path: str,
    target: str | Sequence[str],
    features: Sequence[str] | None = None,
    *,
    exclude: Sequence[str] | None = None,
    weight: str | None = None,
    text: Text = "one_hot",
    max_values: int = 50,
    missing: Missing = "drop",
    decimal: str | None = None,
    in_memory: bool | Literal["auto"] = "auto",
    seed: int = 0,
) -> Table | StoredTable:
    """Reads the columns to predict from, and the one to predict.

    An unchanged file is read once: the check before a run, the run and a sweep's next job share the table.

    Args:
        path: A CSV file in any dialect, a Parquet file, several of them by a pattern (`folder/*.csv`), or
            `pkg://<package>/<file>` for one that a package ships.
        target: The column or columns to predict.
        features: The columns to predict it from; when None all others but row numbers.
        exclude: Columns to leave out.
        weight: The column that says what a row counts in the loss.
        text: Whether a column of text is a 0 or 1 for each of its values, or refused.
        max_values: Text of more values than these is left out.
        missing: Whether a row with a missing feature is left out, refused, or kept as NaN, to become the mean. Without
            target or weight it is always left out.
        decimal: The decimal mark; found when None.
        in_memory: Whether the numbers are kept in memory or in a temporary file; by the memory that is free if `auto`.
        seed: Of the order of the rows there.

    Raises:
        ValueError: The file is missing or holds no row, a name is not a column or stands twice, or a cell is
            not a finite number. The message names file, row, column and value.
    """
    for key, value, allowed in (
        ("text", text, ("one_hot", "refuse")),
        ("missing", missing, ("drop", "mean", "refuse")),
        ("decimal", decimal, (None, ".", ",")),
        ("in_memory", in_memory, ("auto", True, False)),
    ):
        if value not in allowed:
            raise ValueError(f"`{key}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")
    if not isinstance(max_values, int) or max_values < 0:
        raise ValueError(f"`max_values` must be a whole number of at least 0, got {max_values!r}.")
    changed = tuple((stat.st_mtime_ns, stat.st_size) for stat in (file.stat() for file in resolve(path)))
    return _read_table(
        path,
        _names(target) or (),
        _names(features),
        _names(exclude) or (),
        _names(weight) or (),
        Rules(text, max_values, missing),
        decimal,
        changed,
        in_memory,
        None if in_memory is True else seed,
    )


def _names(given: Any) -> tuple[str, ...] | None:
    """The names of columns, which Hydra may have read as numbers."""
    if given is None:
        return None
    return tuple(map(str, given)) if isinstance(given, list | tuple) else (str(given),)


@functools.lru_cache(maxsize=1)
def _read_table(
    path: str,
    targets: tuple[str, ...],
    features: tuple[str, ...] | None,
    exclude: tuple[str, ...],
    weight: tuple[str, ...],
    rules: Rules,
    decimal: str | None,
    _changed: tuple[tuple[int, int], ...],
    in_memory: bool | Literal["auto"],
    seed: int | None,
) -> Table | StoredTable:
    file = open_table(path, decimal)
    features, index = _chosen(path, file.names, targets, features, exclude, weight)
    most_bytes = SHARE * free_memory() if in_memory == "auto" else float("inf") if in_memory else 0.0
    for plan in _plans(path, file, features, (*targets, *weight), rules):
        store = Store(plan.width, most_bytes, seed or 0)
        try:
            num_dropped = _fill(store, path, file, plan, rules.missing)
        except ValueError:  # read as numbers at once; what is not will be told apart
            if not plan.numbers:
                raise
        else:
            break
    num_features = sum(len(column.feature_names) for column in plan.features)
    end = num_features + len(targets)
    notes = [file.said] if file.said else []
    notes += [f"without {listed(index)}: row numbers"] if index else []
    notes += plan.notes
    notes += (
        [f"{num_dropped:,} {'row' if num_dropped == 1 else 'rows'} with missing cells left out"] if num_dropped else []
    )
    name = Path(path).name.partition(".")[0] or path
    names = tuple(name for column in plan.features for name in column.feature_names)
    about = (names, ", ".join(targets))
    if store.file:
        size = f"{8e-9 * store.width * store.num_rows:.2g} GB in a temporary file"
        window = f"{size}, shuffled in windows of {WINDOW * store.chunk_rows:,} rows"
        return StoredTable(name, store, *about, tuple(plan.features), (*notes, window), len(targets))
    values = store.values
    target = values[:, num_features] if len(targets) == 1 else values[:, num_features:end]
    weights = values[:, end] if weight else None
    table = Table(name, values[:, :num_features], target, *about, weights, tuple(plan.features), tuple(notes))
    _warn(table, targets)
    return table


def column_names(path: str) -> list[str]:
    """Returns the names of a file's columns."""
    return open_table(path).names


def read_features(path: str, columns: Sequence[Column], missing: Missing, decimal: str | None = None) -> Array:
    """Reads the features of a new file as those of the table that was trained on; a missing cell is NaN.

    Raises:
        ValueError: A column is not there, or a cell is not what its column holds.
    """
    file = open_table(path, decimal)
    if absent := [column.name for column in columns if column.name not in file.names]:
        raise ValueError(f"{path} must have the columns that the run was trained on, got no {', '.join(absent)}.")
    _check_once(path, file.names, [column.name for column in columns])
    plan = Plan(list(columns), [])
    store = Store(plan.width, float("inf"), 0)
    num_unknown = _fill(store, path, file, plan, "refuse" if missing == "refuse" else "keep")
    values = store.values
    if num_unknown:
        log.warning("%s: %s texts are unknown to the run: they count as none of its values.", path, f"{num_unknown:,}")
    if num_missing := int(np.isnan(values).any(axis=1).sum()):
        done = "count as the mean of the training rows" if missing == "mean" else "are not predicted: nan"
        log.warning("%s: %s rows with missing cells %s.", path, f"{num_missing:,}", done)
    return values


def _chosen(
    path: str,
    header: list[str],
    targets: tuple[str, ...],
    features: tuple[str, ...] | None,
    exclude: tuple[str, ...],
    weight: tuple[str, ...],
) -> tuple[tuple[str, ...], list[str]]:
    """The names of the features, and those of row numbers that are left out."""
    known = f"of {path} ({listed(header, 40)})"
    for key, names in (("target", targets), ("weight", weight), ("features", features or ()), ("exclude", exclude)):
        for name in names:
            if name not in header:
                raise ValueError(
                    f"`{key}` must be {'columns' if key[-1] == 's' else 'a column'} {known}, got {name!r}."
                )
    used, index = (*targets, *weight), []
    if features is None:
        others = [name for name in header if name not in used and name not in exclude]
        index = [name for name in others if not name or INDEX.fullmatch(name)]
        features = tuple(name for name in others if name not in index)
        if not features and index:  # a series: there is nothing else to predict it from
            features, index = (index[0],), index[1:]
    else:
        features = tuple(name for name in features if name not in exclude)
    for name in (*used, *features):
        if (*used, *features).count(name) > 1 and header.count(name) == 1:
            raise ValueError(f"`features` must hold each column once and not the target, got {name!r} again.")
    _check_once(path, header, [*used, *features])
    if not features:
        raise ValueError(f"{path} must hold a column beside the target {listed(targets)} to predict it from, got none.")
    return features, index


def _check_once(path: str, header: list[str], names: Sequence[str]) -> None:
    for name in names:
        if header.count(name) > 1:
            raise ValueError(f"{path} must name each column once, got {name!r} {header.count(name)} times.")


def _plans(
    path: str, file: TableFile, features: tuple[str, ...], others: tuple[str, ...], rules: Rules
) -> Iterator[Plan]:
    """Ways to read the table, the fast ones first: as numbers at once, by the first block; after a look at all."""
    names = (*features, *others)
    places = [file.names.index(name) for name in names]
    if file.is_plain:
        yield Plan([Column(name) for name in features], [Column(name) for name in others], names)
        return
    surveys = [Survey(name, rules.max_values) for name in names]
    for number, block in enumerate(file.blocks(places)):
        for survey, cells in zip(surveys, block, strict=True):
            survey.add(cells, file.marks)
        if number == 0 and all(survey.is_clean for survey in surveys):
            yield Plan([Column(name) for name in features], [Column(name) for name in others], names)
    if not surveys[0].num_rows:
        raise ValueError(f"{path} must hold rows below its header, got none.")
    plan = _judged(path, file, surveys[: len(features)], surveys[len(features) :], rules)
    if numbers := tuple(survey.name for survey in surveys if survey.is_clean):
        yield replace(plan, numbers=numbers)
    yield plan


def _judged(path: str, file: TableFile, features: list[Survey], others: list[Survey], rules: Rules) -> Plan:
    """What the columns hold, each of them looked at; refused where that may be a mistake."""
    for survey in (*features, *others):
        column = survey.column()
        is_text = (column is not None and column.kind == "text") or (column is None and survey.num_wrong > 0)
        if survey in others and (column is None or is_text):
            held = f"text ({listed(sorted(survey.values or ('too much to list',)), 3)})" if is_text else "no number"
            classes = (
                "Classes are another task: make new NAME=…, with experiment=digits as the pattern." if is_text else ""
            )
            raise ValueError(
                f"{path}: {survey.name!r}, the target, must be a column of numbers, got {held}. {classes}".strip()
            )
        if (survey.is_mostly_numbers and column == Column(survey.name)) or (is_text and rules.text == "refuse"):
            row, cell = survey.first_wrong or (0, None)
            present = survey.num_rows - survey.num_missing
            share = f"{survey.num_wrong:,} of {present:,} cells ({survey.num_wrong / present:.2g}) are none"
            raise ValueError(
                f"{file.place(row)}, column {survey.name!r} must be a finite number, got {cell!r}: {share}. "
                f"data.exclude=[{survey.name}] leaves the column out."
            )
        if survey.num_missing and rules.missing == "refuse" and survey in features:
            share = f"{survey.num_missing:,} of {survey.num_rows:,} cells are missing"
            raise ValueError(
                f"{file.place(survey.first_missing)}, column {survey.name!r} must be a finite number, got none: "
                f"{share}. data.missing=drop leaves such rows out."
            )
    sparse = [each.name for each in features if rules.missing == "drop" and 2 * each.num_missing > each.num_rows]
    kept = {each.name: each.column() for each in features if each.name not in sparse}
    columns = [column for column in kept.values() if column]
    empty = [each.name for each in features if each.num_missing == each.num_rows and each.name not in sparse]
    texts = [name for name, column in kept.items() if column is None and name not in empty]
    spread = [f"{column.name} ({len(column.values)})" for column in columns if column.kind == "text"]
    dates = [column.name for column in columns if column.kind == "date"]
    said = {
        f"without {listed(texts)}: text of more than {rules.max_values} values": texts,
        f"without {listed([*sparse, *empty])}: mostly missing": [*sparse, *empty],
        f"a 0 or 1 for each text of {listed(spread)}": spread,
        f"days since 1970 for {listed(dates)}": dates,
    }
    notes = tuple(note for note, names in said.items() if names)
    if not columns:
        raise ValueError(f"{path} must hold a column to predict from, got none that is of use: {'; '.join(notes)}.")
    return Plan(columns, [column for each in others if (column := each.column())], notes=notes)


def _fill(store: Store, path: str, file: TableFile, plan: Plan, missing: str) -> int:
    """Stores the numbers of all rows; returns how many were left out, or, of `keep`, how many texts were unknown."""
    columns = [*plan.features, *plan.others]
    places = [file.names.index(column.name) for column in columns]
    fast = [place for place, column in zip(places, columns, strict=True) if column.name in plan.numbers]
    row = count = 0
    for block in file.blocks(places, fast):
        part, start = np.empty((len(block[0]), plan.width)), 0
        for column, place, cells in zip(columns, places, block, strict=True):
            stop = start + len(column.feature_names)
            if place in fast:
                part[:, start] = cells
            else:
                try:
                    part[:, start:stop], num_unknown = encode(column, cells, file.marks)
                except WrongCellError as error:
                    raise ValueError(f"{file.place(row + error.row)}, {error}") from error
                count += num_unknown * (missing == "keep")
            start = stop
        if fast and (np.abs(part) >= EXACT).any():
            raise ValueError("Only a look at the text can tell whether float64 holds this.")
        absent, num_features = np.isnan(part), plan.width - len(plan.others)
        if missing == "refuse" and absent[:, :num_features].any():
            bad = int(absent[:, :num_features].any(axis=1).argmax())
            raise ValueError(f"{file.place(row + bad)} must hold a finite number in each cell, got none.")
        if missing != "keep" and (gone := absent[:, 0 if missing == "drop" else num_features :].any(axis=1)).any():
            count += int(gone.sum())
            store.add(part[~gone])
        else:
            store.add(part)
        row += len(part)
    if not store.num_rows:
        got = f"{row:,} with a missing cell in each: data.exclude=[…] or data.missing=mean" if row else "none"
        raise ValueError(f"{path} must hold rows below its header, got {got}.")
    store.finish()
    return count


def listed(names: Sequence[str], most: int = 5) -> str:
    """Returns names for people, not too many of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name or "''" for name in names[:most]) + more


def _warn(table: Table, targets: Sequence[str]) -> None:
    """Warns of what makes a task too easy, or no regression."""
    columns = dict(zip(table.feature_names, table.features.T, strict=True))
    for name, target in zip(targets, table.target.reshape(len(table), -1).T, strict=True):
        distinct = np.unique(target[:ROWS_AT_ONCE])
        if (target == target[0]).all():
            log.warning("%s: the target %s is %g in every row: there is nothing to learn.", table.name, name, target[0])
        elif len(distinct) <= min(FEW_VALUES, len(table) // 5) and not (target % 1).any():
            text = "%s: the target %s holds %d whole numbers alone. If they are classes: %s"
            log.warning(text, table.name, name, len(distinct), CLASSES)
        if same := [
            each for each, column in columns.items() if column[0] == target[0] and np.array_equal(column, target)
        ]:
            log.warning("%s: %s is equal to the target %s: data.exclude=[…].", table.name, listed(same), name)
    seen: dict[tuple[float, ...], str] = {}
    for name, column, total in zip(columns, columns.values(), table.features.sum(axis=0).tolist(), strict=True):
        first = seen.setdefault((total, *column[:9].tolist()), name)
        if first != name and np.array_equal(column, columns[first]):
            log.warning("%s: the columns %s and %s are the same.", table.name, first, name)
