"""A table of numbers out of the user's file: what is left out is said, and a refusal names the cell."""

import functools
import glob
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

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
IDENTIFIER = re.compile(r"(.*[\W_])?(?i:id|idx|index|nr|no)|.*[a-z]I[dD]")
CLASSES = "make new NAME=…, with experiment=digits as the pattern."
FEW_VALUES = 10  # of a target of whole numbers: they may be classes
ROWS_AT_ONCE = 65_536
HEAD = 1000  # rows that settle how a table is read, unless a later one is otherwise
LEAST_ROWS = 2  # of a part: R² needs two
SHARE = 0.3  # of the memory that is free, for a table in it: standardised, it takes half as much again

Missing = Literal["drop", "mean", "refuse"]
Text = Literal["one_hot", "refuse"]
ALLOWED = {
    "text": ("one_hot", "refuse"),
    "missing": ("drop", "mean", "refuse"),
    "decimal": (None, ".", ","),
    "in_memory": ("auto", True, False),
}


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
        whole: list[torch.Tensor] = []
        for number, chunk in enumerate(self.chunks(rows)):
            batch = units.apply(*chunk)
            whole = whole or [torch.empty(len(rows), *each.shape[1:]) for each in batch]
            for kept, each in zip(whole, batch, strict=True):
                kept[number * ROWS_AT_ONCE : number * ROWS_AT_ONCE + len(each)] = each
        return Part(whole)

    @functools.cached_property
    def digest(self) -> str:
        """The beginning of the SHA-256 of every cell: whether two tables hold the same numbers."""
        digest = hashlib.sha256()
        for values in (self.features, self.target, self.weight):
            for start in range(0, len(self) if values is not None else 0, ROWS_AT_ONCE):
                digest.update(values[start : start + ROWS_AT_ONCE].tobytes())  # type: ignore[index]
        return digest.hexdigest()[:12]


def split(table: Table | StoredTable, seed: int, fractions: tuple[float, float]) -> dict[str, Any]:
    """Returns the rows to train on, to validate and to test with.

    Raises:
        ValueError: There are too few.
    """
    rows: dict[str, Any] = table.split(seed, fractions)
    if min(map(len, rows.values())) < LEAST_ROWS:
        raise ValueError(
            f"{table.name} must leave {LEAST_ROWS} rows to train on beside {len(rows['val'])} for validation and "
            f"{len(rows['test'])} for test, got {len(table)} rows."
        )
    return rows


@dataclass(frozen=True)
class Reading:
    """How a table is to be read; names as they stand in the file, also where Hydra took one for a number.

    Attributes:
        path: A CSV file in any dialect, a Parquet file, several of them by a pattern (`folder/*.csv`), or
            `pkg://<package>/<file>` for one that a package ships.
        target: The column or columns to predict.
        features: The columns to predict it from; when None all others but row numbers.
        exclude: Columns to leave out.
        weight: The column that says what a row counts in the loss.
        text: Whether a column of text is a 0 or 1 for each of its values (`one_hot`), or refused (`refuse`).
        max_values: Text of more values than these is left out.
        missing: Whether a row with a missing feature is left out (`drop`), refused, or kept as NaN, to become
            the `mean`. Without target or weight it is always left out.
        decimal: The decimal mark; found when None.
        in_memory: Whether the numbers are kept in memory or in a temporary file; by the memory that is free if `auto`.
        seed: Of the order of the rows there.

    Raises:
        ValueError: A setting is none of those that are allowed.
    """

    path: str
    target: Any
    features: Any = None
    exclude: Any = ()
    weight: Any = ()
    text: Text = "one_hot"
    max_values: int = 50
    missing: Missing = "drop"
    decimal: str | None = None
    in_memory: bool | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for key, allowed in ALLOWED.items():
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"`{key}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")
        if not isinstance(self.max_values, int) or self.max_values < 0:
            raise ValueError(f"`max_values` must be a whole number of at least 0, got {self.max_values!r}.")
        for key in ("target", "features", "exclude", "weight"):
            given = getattr(self, key)
            names = tuple(map(str, given if isinstance(given, list | tuple) else () if given is None else (given,)))
            object.__setattr__(self, key, None if key == "features" and given is None else names)


@dataclass(frozen=True)
class Plan:
    """How the columns that are used become numbers.

    Attributes:
        features: The columns to predict from.
        others: Targets and weight.
        numbers: Names of those that the reader turns into numbers by itself.
        notes: What is left out and changed, for people.
        has_weight: Whether the last of the others is one.
        is_guess: Whether it is made of the first rows alone.
    """

    features: list[Column]
    others: list[Column]
    numbers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    has_weight: bool = False
    is_guess: bool = False

    @functools.cached_property
    def width(self) -> int:
        """Numbers a row."""
        return sum(len(column.feature_names) for column in (*self.features, *self.others))


def read_table(path: str, target: Any, features: Any = None, **settings: Any) -> Table | StoredTable:
    """Reads the columns to predict from, and the one to predict; `settings` are those of `Reading`.

    An unchanged file is read once: the check before a run, the run and a sweep's next job share the table.

    Raises:
        ValueError: The file is missing or holds no row, a name is not a column or stands twice, or a cell is
            not a finite number. The message names file, row, column and value.
    """
    asked = Reading(path, target, features, **settings)
    asked = replace(asked, seed=0) if asked.in_memory is True else asked
    return _read_table(asked, tuple((stat.st_mtime_ns, stat.st_size) for stat in map(Path.stat, resolve(path))))


@functools.lru_cache(maxsize=1)
def _read_table(asked: Reading, _changed: tuple[tuple[int, int], ...]) -> Table | StoredTable:
    file = open_table(asked.path, asked.decimal)
    names, index = _chosen(asked, file.names)
    most_bytes = SHARE * free_memory() if asked.in_memory == "auto" else math.inf if asked.in_memory else 0.0
    for plan in _plans(asked, file, names):
        try:
            store = Store(plan.width, most_bytes, asked.seed)
            num_dropped = _fill(store, asked.path, file, plan, asked.missing)
            break
        except ValueError as error:  # a look at the whole table tells what it holds
            refusal = error.with_traceback(None)  # nor are the rows kept that were read
    else:
        raise refusal
    notes = [file.said] if file.said else []
    notes += [f"without {listed(index)}: row numbers"] if index else []
    notes += plan.notes
    notes += [f"{counted(num_dropped, 'row')} with missing cells left out"] if num_dropped else []
    name = Path(asked.path).name.partition(".")[0]
    name = name if name and not glob.has_magic(name) else asked.path
    about = (tuple(name for column in plan.features for name in column.feature_names), ", ".join(asked.target))
    if store.file:
        notes.append(f"{8e-9 * store.width * store.num_rows:.2g} GB in a temporary file, shuffled in windows of ")
        notes[-1] += f"{WINDOW * store.chunk_rows:,} rows"
        stored = StoredTable(name, store, *about, tuple(plan.features), tuple(notes), len(asked.target))
        _warn(stored, asked, stored.all_rows().chunks)
        return stored
    features, targets, weight = np.split(store.values, np.cumsum([len(about[0]), len(asked.target)]), axis=1)
    target, weights = targets[:, 0] if len(asked.target) == 1 else targets, weight[:, 0] if asked.weight else None
    table = Table(name, features, target, *about, weights, tuple(plan.features), tuple(notes))
    _warn(table, asked, lambda: iter([(features, targets, None)]))
    return table


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
    store = Store(plan.width, math.inf, 0)
    if unknown := _fill(store, path, file, plan, "refuse" if missing == "refuse" else "keep"):
        log.warning("%s: %s that the run does not know: counted as none of its values.", path, counted(unknown, "text"))
    if absent_rows := int(np.isnan(store.values).any(axis=1).sum()):
        done = "filled with the mean of the training rows" if missing == "mean" else "predicted as nan"
        log.warning("%s: %s with missing cells: %s.", path, counted(absent_rows, "row"), done)
    return store.values


def _chosen(asked: Reading, header: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The names of the features, and those of row numbers that are left out."""
    known, used, index = f"of {asked.path} ({listed(header, 40)})", (*asked.target, *asked.weight), list[str]()
    given = {key: getattr(asked, key) for key in ("target", "weight", "features", "exclude")}
    for key, name in ((key, name) for key, names in given.items() for name in names or ()):
        if name not in header:
            what = "columns" if key == "features" else "a column"
            raise ValueError(f"`{key}` must be {what} {known}, got {name!r}.")
    features = tuple(name for name in asked.features or header if name not in asked.exclude)
    if asked.features is None:
        others = [name for name in features if name not in used]
        index = [name for name in others if not name or INDEX.fullmatch(name)]
        if index == others:  # of a series there is nothing else to predict it from
            index = others[1:]
        features = tuple(name for name in others if name not in index)
    for name in (*used, *features):
        if (*used, *features).count(name) > 1 and header.count(name) == 1:
            raise ValueError(f"`features` must hold each column once and not the target, got {name!r} again.")
    _check_once(asked.path, header, [*used, *features])
    if not features:
        what = f"a column beside the target {listed(asked.target)} to predict it from"
        raise ValueError(f"{asked.path} must hold {what}, got none.")
    return features, index


def _check_once(path: str, header: list[str], names: Sequence[str]) -> None:
    for name in names:
        if header.count(name) > 1:
            raise ValueError(f"{path} must name each column once, got {name!r} {header.count(name)} times.")


def _plans(asked: Reading, file: TableFile, features: tuple[str, ...]) -> Iterator[Plan]:
    """Ways to read the table, the fast ones first: as numbers at once, by the first block; after a look at all."""
    names = (*features, *asked.target, *asked.weight)
    if file.is_plain:
        columns = list(map(Column, names))
        yield Plan(columns[: len(features)], columns[len(features) :], has_weight=bool(asked.weight))
        return
    surveys = _surveys(asked, names, file, HEAD)
    if all(survey.is_settled for survey in surveys):
        yield replace(_judged(asked, surveys[: len(features)], surveys[len(features) :]), is_guess=True)
    surveys = _surveys(asked, names, file)
    if not surveys[0].num_rows:
        raise ValueError(f"{asked.path} must hold rows below its header, got none.")
    for survey in surveys:
        if wrong := _wrong(survey, survey.name not in features, asked, file):
            raise ValueError(wrong)
    plan = _judged(asked, surveys[: len(features)], surveys[len(features) :])
    if plan.numbers:
        yield plan
    yield replace(plan, numbers=())


def _surveys(asked: Reading, names: Sequence[str], file: TableFile, num_rows: int | None = None) -> list[Survey]:
    """A look at columns, at all of them or at the first rows."""
    surveys = [Survey(name, asked.max_values) for name in names]
    for block in file.blocks(list(map(file.names.index, names))):
        for survey, cells in zip(surveys, block, strict=True):
            survey.add(cells[:num_rows], file.marks)
        if num_rows:
            break
    return surveys


def _wrong(survey: Survey, is_target: bool, asked: Reading, file: TableFile) -> str | None:
    """What may be a mistake in a column, in words."""
    column, name = survey.column(), survey.name
    is_text = column.kind == "text" if column else survey.num_wrong > 0
    if is_target and is_text:
        values = listed(sorted(survey.values or ("of many values",)), 3)
        return (
            f"{asked.path}: {name!r} must be a column of numbers, got text ({values}). If these are classes: {CLASSES}"
        )
    if is_target and column is None:
        return f"{asked.path}: {name!r} must be a column of numbers, got none."
    must = f"column {name!r} must be a finite number, got"
    if (survey.is_mostly_numbers and column == Column(name)) or (is_text and asked.text == "refuse"):
        row, cell = survey.first_wrong or (0, None)
        share = f"{survey.num_wrong:,} of {survey.num_rows - survey.num_missing:,} cells are not"
        return f"{file.place(row)}, {must} {cell!r}: {share}. data.exclude=[{name}] leaves the column out."
    if survey.num_missing and asked.missing == "refuse" and not is_target:
        share = f"{survey.num_missing:,} of {survey.num_rows:,} cells are missing"
        return f"{file.place(survey.first_missing)}, {must} none: {share}. data.missing=drop leaves such rows out."
    return None


def _judged(asked: Reading, features: list[Survey], others: list[Survey]) -> Plan:
    """What the columns hold, each of them looked at."""
    columns, left_out, changed = [], dict[str, list[str]](), dict[str, list[str]]()
    for survey in features:
        column = survey.column()
        if survey.num_missing > survey.num_rows / (2 if asked.missing == "drop" else 1.001):
            left_out.setdefault("mostly missing", []).append(survey.name)
        elif column is None:
            reason = f"text of more than {asked.max_values} values" if survey.num_wrong else "no numbers"
            left_out.setdefault(reason, []).append(survey.name)
        else:
            columns.append(column)
            if column.kind == "text":
                changed.setdefault("a 0 or 1 for each value of", []).append(f"{column.name} ({len(column.values)})")
            elif column.kind == "date":
                changed.setdefault("days since 1970 for", []).append(column.name)
    notes = [f"without {listed(names)}: {reason}" for reason, names in left_out.items()]
    notes += [f"{what} {listed(names)}" for what, names in changed.items()]
    if not columns:
        raise ValueError(
            f"{asked.path} must hold a column to predict from, got none that is of use: {'; '.join(notes)}."
        )
    numbers = tuple(survey.name for survey in (*features, *others) if survey.is_clean)
    targets = [column for survey in others if (column := survey.column())]
    return Plan(columns, targets, numbers, tuple(notes), bool(asked.weight))


def _fill(store: Store, path: str, file: TableFile, plan: Plan, missing: str) -> int:
    """Stores the numbers of all rows; returns how many were left out, or, of `keep`, how many texts were unknown."""
    columns = [*plan.features, *plan.others]
    places = [file.names.index(column.name) for column in columns]
    fast = [place for place, column in zip(places, columns, strict=True) if column.name in plan.numbers]
    row = count = 0
    for block in file.blocks(places, fast):
        if len(fast) == len(places):  # at once, as there is nothing but doubles
            part = block.to_tensor(null_to_nan=True).to_numpy()
        else:
            part, start = np.empty((len(block[0]), plan.width)), 0
            for column, place, cells in zip(columns, places, block, strict=True):
                if place in fast or isinstance(cells, np.ndarray):  # numbers already, as the shipped table's are
                    values, num_unknown = np.asarray(cells)[:, None], 0
                else:
                    try:
                        values, num_unknown = encode(column, cells, file.marks)
                    except WrongCellError as error:
                        raise ValueError(f"{file.place(row + error.row)}, {error}") from error
                part[:, start : start + values.shape[1]] = values
                start += values.shape[1]
                count += num_unknown * (missing == "keep")
        is_whole = part.size > 0 and part.min() > -EXACT and part.max() < EXACT  # of NaN all this is false
        if fast and not is_whole and (np.abs(part) >= EXACT).any():
            raise ValueError("Only a look at the text can tell whether float64 holds this.")
        if plan.has_weight and (part[:, -1] < 0).any():
            bad = int((part[:, -1] < 0).argmax())
            raise ValueError(f"{file.place(row + bad)} must have a weight of at least 0, got {part[bad, -1]:g}.")
        row += len(part)
        if not is_whole and missing != "keep":
            num_features = plan.width - len(plan.others)
            absent = np.isnan(part)
            if missing == "refuse" and (refused := absent[:, :num_features].any(axis=1)).any():
                where = file.place(row - len(part) + int(refused.argmax()))
                raise ValueError(f"{where} must hold a finite number in each cell, got none.")
            gone = absent[:, 0 if missing == "drop" else num_features :].any(axis=1)
            count += int(gone.sum())
            part = part[~gone]
        store.add(part)
    if plan.is_guess and 2 * count > row:
        raise ValueError("Some column may be mostly missing: which?")
    if not store.num_rows:
        got = f"{row:,} with a missing cell in each: data.exclude=[…] or data.missing=mean" if row else "none"
        raise ValueError(f"{path} must hold rows below its header, got {got}.")
    store.finish()
    return count


def listed(names: Sequence[str], most: int = 5) -> str:
    """Returns names for people, not too many of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name or "an unnamed one" for name in names[:most]) + more


def counted(number: int, noun: str) -> str:
    """Returns a number of things for people."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _warn(table: Table | StoredTable, asked: Reading, chunks: Callable[[], Iterator[Rows]]) -> None:
    """Warns of what makes a task too easy, no regression, or is no feature."""
    features, target, _ = next(chunks())
    names, alike = (*table.feature_names, *asked.target), dict[tuple[float, ...], list[int]]()
    for place, total in enumerate([*features.sum(axis=0).tolist(), *target.sum(axis=0).tolist()]):
        values = features[:9, place] if place < features.shape[1] else target[:9, place - features.shape[1]]
        alike.setdefault((total, *values.tolist()), []).append(place)

    def is_same(*places: int) -> bool:
        return all(np.array_equal(*([*rows[0].T, *rows[1].T][place] for place in places)) for rows in chunks())

    pairs = [(group[0], other) for group in alike.values() for other in group[1:] if is_same(group[0], other)]
    for place, name in enumerate(asked.target):
        values = target[:ROWS_AT_ONCE, place]
        if all((rows[1][:, place] == values[0]).all() for rows in chunks()):
            log.warning("%s: the target %s is %g in every row: there is nothing to learn.", table.name, name, values[0])
        elif len(np.unique(values)) <= min(FEW_VALUES, len(table) // 5) and not (target[:, place] % 1).any():
            text = "%s: the target %s takes only %d values, whole numbers. If they are classes: %s"
            log.warning(text, table.name, name, len(np.unique(values)), CLASSES)
    for one, other in sorted(pairs, key=lambda pair: pair[1] < features.shape[1]):
        if other < features.shape[1]:
            log.warning("%s: the columns %s and %s are identical.", table.name, names[one], names[other])
        else:
            text = "%s: %s is a copy of the target %s. To leave it out: data.exclude=[%s]."
            log.warning(text, table.name, names[one], names[other], names[one])

    def is_identifier(name: str) -> bool:
        values = features[:, table.feature_names.index(name)]
        return len(np.unique(values)) == len(values) and not (values % 1).any()

    found = [name for name in table.feature_names if IDENTIFIER.fullmatch(name) and is_identifier(name)]
    if found and asked.features is None and len(found) < len(table.feature_names):
        text = "%s: different whole numbers in every row: %s. If it is an identifier, leave it out: data.exclude=[%s]."
        log.warning(text, table.name, listed(found), ",".join(found))
