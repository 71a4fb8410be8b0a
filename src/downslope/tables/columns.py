"""What a column holds, found by looking at all of it, and its cells as numbers: in a new file as in the first."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from downslope.tables.files import MISSING

Array = NDArray[np.float64]

INFINITE = r"(?i)^[+-]?inf(inity)?$"
NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
DATES = ("", "%d.%m.%Y", "%Y/%m/%d", "%d/%m/%Y", "%m/%d/%Y")  # the first is ISO 8601
EXACT = 2.0**53  # from here on float64 leaves whole numbers out
MOSTLY = 0.9  # of a column's cells that must be numbers, for it to be one of numbers that has wrong cells
DAY = 86_400_000_000  # microseconds


@dataclass(frozen=True)
class Column:
    """How a column's cells become numbers.

    Attributes:
        name: Its name in the file.
        kind: `number`, `boolean` (0 and 1), `date` (days since 1970) or `text` (a 0 or 1 for each of its values).
        values: Of text, those that stand in the table; another one is none of them.
        form: How a date is written, empty for ISO 8601.
    """

    name: str
    kind: str = "number"
    values: tuple[str, ...] = ()
    form: str = ""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The columns that the model sees."""
        return tuple(f"{self.name}={value}" for value in self.values) if self.kind == "text" else (self.name,)

    def state_dict(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {**asdict(self), "values": list(self.values)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Column":
        """Returns what `state_dict` was taken of."""
        return cls(**{**state, "values": tuple(map(str, state["values"]))})


class WrongCellError(ValueError):
    """A cell that is not what its column holds.

    Attributes:
        row: Its number in the block.
    """

    def __init__(self, row: int, column: str, must: str, cell: Any) -> None:
        super().__init__(f"column {column!r} must be {must}, got {cell!r}.")
        self.row = row


def encode(column: Column, cells: Any, marks: tuple[str, str]) -> tuple[Array, int]:
    """Returns the numbers of an Arrow array, a row each and NaN where the cell is missing, and how many are unknown.

    Raises:
        WrongCellError: The first that cannot be.
    """
    import pyarrow
    from pyarrow import compute, types

    cells = plain(cells)
    is_text, must = types.is_string(cells.type), "a finite number"
    if column.kind == "text":
        texts = trimmed(cells if is_text else cells.cast(pyarrow.string()))
        codes = compute.index_in(texts, value_set=_strings(column.values)).fill_null(-1).to_numpy(zero_copy_only=False)
        values = (codes[:, None] == np.arange(len(column.values))).astype(np.float64)
        missing = compute.is_null(texts).to_numpy(zero_copy_only=False)
        values[missing] = np.nan
        return values, int(((codes < 0) & ~missing).sum())
    if column.kind == "date" and not types.is_floating(cells.type):
        texts, must = (trimmed(cells) if is_text else cells), "a date"
        values = days(texts, column.form) if is_text else _float64(cells)
    elif is_text and column.kind == "boolean":
        texts, must = trimmed(cells), "true or false"
        lower = compute.utf8_lower(texts)
        values = np.where(_equal(lower, "true", "1"), 1.0, np.where(_equal(lower, "false", "0"), 0.0, np.nan))
    elif is_text:
        texts = trimmed(cells)
        values = numbers(texts, marks)
    else:
        texts, values = cells, _float64(cells)
    wrong = np.isinf(values)
    if texts.null_count or np.isnan(values).any():
        unread = np.isnan(values) & compute.is_valid(texts).to_numpy(zero_copy_only=False)
        wrong |= unread & (is_text or column.kind == "date")
    if wrong.any():
        row = int(wrong.argmax())
        raise WrongCellError(row, column.name, must, cells[row].as_py())
    if must == "a finite number" and (np.abs(values) >= EXACT).any() and (is_text or types.is_integer(cells.type)):
        for row in np.flatnonzero(np.abs(values) >= EXACT).tolist():
            cell = str(cells[row].as_py()).strip()
            if re.fullmatch(r"[+-]?\d+", cell) and int(cell) != int(values[row]):
                raise WrongCellError(
                    row, column.name, "a number that float64 holds exactly (whole ones to 2^53)", cells[row].as_py()
                )
    return values[:, None], 0


def plain(cells: Any) -> Any:
    """Returns an Arrow array without dictionary, and of one type of text."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    if types.is_large_string(cells.type) or types.is_string_view(cells.type) or types.is_null(cells.type):
        cells = cells.cast(pyarrow.string())
    return cells


def trimmed(cells: Any) -> Any:
    """Returns an array of strings without blanks around them, null where a cell says that it is missing."""
    import pyarrow
    from pyarrow import compute

    texts = compute.utf8_trim_whitespace(cells)
    return compute.if_else(compute.is_in(texts, value_set=_strings(MISSING)), pyarrow.scalar(None, texts.type), texts)


def numbers(texts: Any, marks: tuple[str, str]) -> Array:
    """Returns the numbers that strings spell, NaN for what is none: no separator is taken for another."""
    import pyarrow
    from pyarrow import compute

    decimal, thousands = marks
    if thousands:
        shape = rf"^[+-]?[1-9]\d{{0,2}}([{re.escape(thousands)}]\d{{3}})+([{re.escape(decimal)}]\d*)?$"
        grouped = compute.match_substring_regex(texts, shape)
        texts = compute.if_else(grouped, compute.replace_substring(texts, thousands, ""), texts)
    if decimal == ",":
        pointed = compute.match_substring(texts, ".")
        texts = compute.if_else(pointed, "x", compute.replace_substring(texts, ",", "."))
    texts = compute.replace_substring_regex(texts, r"^\+([\d.])", r"\1")
    spelled = compute.match_substring_regex(texts, NUMBER)
    if compute.all(spelled).as_py() is not True:
        texts = compute.if_else(spelled, texts, pyarrow.scalar(None, texts.type))
    return _float64(texts)


def days(texts: Any, form: str) -> Array:
    """Returns dates as days since 1970, NaN for what is none."""
    import pyarrow
    from pyarrow import compute

    if form:
        return _float64(compute.strptime(texts, format=form, unit="us", error_is_null=True))
    shape = r"^\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?$"
    texts = compute.if_else(compute.match_substring_regex(texts, shape), texts, pyarrow.scalar(None, texts.type))
    has_zone = compute.match_substring_regex(texts, r"(Z|:\d\d.*[+-]\d\d:?\d\d)$")
    nothing = pyarrow.scalar(None, texts.type)
    try:
        here = compute.if_else(has_zone, nothing, texts).cast(pyarrow.timestamp("us"))
        there = compute.if_else(has_zone, texts, nothing).cast(pyarrow.timestamp("us", "UTC"))
    except pyarrow.ArrowInvalid:  # the 30th of February
        return np.full(len(texts), np.nan)
    return np.where(np.isnan(_float64(here)), _float64(there), _float64(here))


def _float64(cells: Any) -> Array:
    import pyarrow
    from pyarrow import compute, types

    kind = cells.type
    if types.is_date(kind) or types.is_timestamp(kind):
        zone = kind.tz if types.is_timestamp(kind) else None
        stamps = cells.cast(pyarrow.timestamp("us", zone), safe=False).cast(pyarrow.int64())
        return np.asarray(
            compute.divide(stamps.cast(pyarrow.float64(), safe=False), float(DAY)).to_numpy(zero_copy_only=False)
        )
    return np.asarray(cells.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)


def _strings(values: Sequence[str]) -> Any:
    import pyarrow

    return pyarrow.array(list(values), pyarrow.string())


def _equal(texts: Any, *values: str) -> NDArray[np.bool_]:
    from pyarrow import compute

    return np.asarray(compute.is_in(texts, value_set=_strings(values)).to_numpy(zero_copy_only=False), dtype=bool)


class Survey:
    """What a column turns out to be, block by block.

    Attributes:
        num_missing: Cells without a value.
        num_wrong: Cells that are no numbers.
        first_wrong: Row and cell of the first of them.
        first_missing: Row of the first cell without a value.
        values: Its distinct texts, None when there are many more than `most_values`.
    """

    def __init__(self, name: str, most_values: int) -> None:
        self.name, self.most_values = name, most_values
        self.num_rows = self.num_missing = self.num_wrong = 0
        self.first_wrong: tuple[int, Any] | None = None
        self.first_missing = 0
        self.values: set[str] | None = set()
        self.forms: tuple[str, ...] = DATES
        self.typed, self.is_grouped = "", False

    def add(self, cells: Any, marks: tuple[str, str]) -> None:
        """Looks at some more of its cells."""
        from pyarrow import compute, types

        cells = plain(cells)
        if types.is_string(cells.type):
            texts, self.is_grouped = trimmed(cells), bool(marks[1])
            self._add_texts(texts, marks)
        else:
            texts, kind = cells, cells.type
            is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
            is_date = types.is_date(kind) or types.is_timestamp(kind)
            self.typed = (
                "boolean" if types.is_boolean(kind) else "date" if is_date else "number" if is_number else "other"
            )
            if types.is_floating(kind):
                texts = compute.if_else(compute.is_nan(cells), None, cells)
        if texts.null_count and not self.num_missing:
            self.first_missing = self.num_rows + int(compute.is_null(texts).to_numpy(zero_copy_only=False).argmax())
        self.num_missing += texts.null_count
        self.num_rows += len(texts)

    def _add_texts(self, texts: Any, marks: tuple[str, str]) -> None:
        from pyarrow import compute

        present = compute.is_valid(texts).to_numpy(zero_copy_only=False)
        infinite = compute.match_substring_regex(texts, INFINITE).fill_null(False).to_numpy(zero_copy_only=False)
        wrong = np.isnan(numbers(texts, marks)) & present & ~infinite
        if self.values is not None:
            self.values |= set(compute.drop_null(compute.unique(texts)).to_pylist())
            self.values = self.values if len(self.values) <= max(self.most_values, 6) else None  # true, True, TRUE
        if present.any():
            is_wrong = bool(wrong.all() if present.all() else wrong[present].all())
            self.forms = tuple(
                form for form in self.forms if is_wrong and not (np.isnan(days(texts, form)) & present).any()
            )
        if wrong.any():
            self.first_wrong = self.first_wrong or (
                self.num_rows + int(wrong.argmax()),
                texts[int(wrong.argmax())].as_py(),
            )
            self.num_wrong += int(wrong.sum())

    def column(self) -> Column | None:
        """Returns how its cells become numbers, None where they do not: too many texts, or no cell at all."""
        if self.num_missing == self.num_rows or self.typed == "other":
            return None
        if self.typed or not self.num_wrong:
            return Column(self.name, self.typed or "number")
        if self.values and {value.lower() for value in self.values} <= {"true", "false"}:
            return Column(self.name, "boolean")
        if len(self.forms) == 1:
            return Column(self.name, "date", form=self.forms[0])
        if self.is_mostly_numbers:
            return Column(self.name)
        is_short = self.values and len(self.values) <= self.most_values
        return Column(self.name, "text", tuple(sorted(self.values or ()))) if is_short else None

    @property
    def is_clean(self) -> bool:
        """Whether its cells are numbers that a reader of CSV takes for such."""
        return not self.typed and not self.num_wrong and not self.is_grouped

    @property
    def is_settled(self) -> bool:
        """Whether the cells seen so far let expect what the others hold."""
        is_there = self.typed != "other" and 2 * self.num_missing < self.num_rows
        return is_there and (self.is_clean or bool(self.typed))

    @property
    def is_mostly_numbers(self) -> bool:
        """Whether so few of its cells are no numbers that they look like mistakes."""
        return 0 < self.num_wrong <= (1 - MOSTLY) * (self.num_rows - self.num_missing)
