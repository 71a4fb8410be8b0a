"""A table of finite numbers, read from the user's file: every cell is checked, and a refusal names it."""

import contextlib
import csv
import functools
import hashlib
import importlib.util
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PACKAGE_PREFIX = "pkg://"
MAX_HEADER = 2**20  # characters: a file of nothing but zeros is not read to its end
DELIMITERS = ",;\t"


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of finite numbers with names; read-only.

    Attributes:
        name: Where it came from, for people.
        features: One row a sample, one column a feature.
        target: One value a row.
        feature_names: One name a column of `features`.
        target_name: What is predicted.
    """

    name: str
    features: Array
    target: Array
    feature_names: tuple[str, ...]
    target_name: str

    def __post_init__(self) -> None:
        self.features.flags.writeable = False
        self.target.flags.writeable = False

    def __len__(self) -> int:
        return len(self.target)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of every cell: whether two tables hold the same numbers."""
        return hashlib.sha256(self.features.tobytes() + self.target.tobytes()).hexdigest()


def read_table(path: str, target: str, features: Sequence[str] | None = None) -> Table:
    """Reads the columns to predict from, and the one to predict.

    An unchanged file is read once: the check before a run, the run and a sweep's next job share the table.

    Args:
        path: A CSV file (comma, semicolon or tab; quotes; UTF-8 with or without a byte-order mark; a header
            line), a `.parquet` file, or `pkg://<package>/<file>` for one that a package ships.
        target: The column to predict.
        features: The columns to predict it from; all others when None.

    Raises:
        ValueError: The file is missing or holds no row, a name is not a column or stands twice, or a cell is
            not a finite number. The message names file, row, column and value.
    """
    stat = _resolve(path).stat()
    return _read_table(path, target, None if features is None else tuple(features), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _read_table(path: str, target: str, features: tuple[str, ...] | None, _modified: int, _size: int) -> Table:
    header = column_names(path)
    if target not in header:
        raise ValueError(f"`target` must be a column of {path} ({', '.join(header)}), got {target!r}.")
    if features is None:
        features = tuple(name for name in header if name != target)
    for name in features:
        if name not in header:
            raise ValueError(f"`features` must be columns of {path} ({', '.join(header)}), got {name!r}.")
        if name == target or features.count(name) > 1:
            raise ValueError(f"`features` must hold each column once and not the target, got {name!r} again.")
    if not features:
        raise ValueError(f"{path} must hold a column beside the target {target!r} to predict it from, got none.")
    values = read_columns(path, [*features, target])
    return Table(Path(path).stem, values[:, :-1], values[:, -1], features, target)


def column_names(path: str) -> list[str]:
    """Returns the names of a file's columns, checked: each there, each once."""
    file = _resolve(path)
    if _is_parquet(file):
        with _pyarrow(path) as pyarrow:
            header = list(pyarrow.parquet.read_schema(file).names)
    else:
        with _csv_reader(path, file) as reader:
            header = _header(reader)
    for name in header:
        if not name:
            raise ValueError(f"{path} must name every column in its first line, got an empty name in {header}.")
        if header.count(name) > 1:
            raise ValueError(f"{path} must name each column once, got {name!r} {header.count(name)} times.")
    return header


def read_columns(path: str, names: Sequence[str]) -> Array:
    """Reads columns of a file, in the order of the names, a row each; other columns may hold anything.

    Args:
        path: As for `read_table`.
        names: Names out of `column_names(path)`.

    Raises:
        ValueError: There is no row, or a cell is not a finite number.
    """
    file = _resolve(path)
    values = (_read_parquet if _is_parquet(file) else _read_csv)(path, file, names)
    if not len(values):
        raise ValueError(f"{path} must hold rows below its header, got none.")
    return values


def _resolve(path: str) -> Path:
    if not isinstance(path, str) or not path:
        raise ValueError(f"`data.path` must name a CSV or Parquet file, got {path!r}.")
    packaged = path.startswith(PACKAGE_PREFIX)
    file = _in_package(path) if packaged else Path(path).expanduser()
    if not file.is_file():
        what = "a folder" if file.is_dir() else "there is no such file"
        if "://" in path and not packaged:
            what = "nothing is fetched from an address"
        raise ValueError(f"`data.path` must name a CSV or Parquet file, got {path!r}: {what}.")
    return file


def _in_package(path: str) -> Path:
    """The file, found without importing its package, which would run it."""
    package, _, name = path.removeprefix(PACKAGE_PREFIX).partition("/")
    root, *inner = package.split(".")
    spec = importlib.util.find_spec(root) if root else None
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0], *inner, name) if folders else Path(path)


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() in {".parquet", ".pq"}


@contextlib.contextmanager
def _csv_reader(path: str, file: Path) -> Iterator[Any]:
    """Splits by the delimiter that gives the most names."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline(MAX_HEADER)
            if len(first) == MAX_HEADER:
                raise ValueError(f"{path} must name its columns in a line of less than {MAX_HEADER:,} characters.")
            if not first.strip():
                raise ValueError(f"{path} must start with a line of column names, got an empty file or line.")
            delimiter = max(DELIMITERS, key=lambda candidate: len(next(csv.reader([first], delimiter=candidate))))
            lines.seek(0)
            yield csv.reader(lines, delimiter=delimiter)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got another byte at position {error.start}.") from error
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}.") from error


def _header(reader: Iterator[list[str]]) -> list[str]:
    return [name.strip() for name in next(reader)]


def _read_csv(path: str, file: Path, names: Sequence[str]) -> Array:
    values = array("d")
    with _csv_reader(path, file) as reader:
        header = _header(reader)
        columns = [(name, header.index(name)) for name in names]
        for row, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) != len(header):
                place = f"{path}, row {row} (line {reader.line_num})"
                raise ValueError(f"{place} must hold {len(header)} cells like the header, got {len(cells)}.")
            for name, index in columns:
                number = _number(cells[index])
                if number is None:
                    _refuse(f"{path}, row {row} (line {reader.line_num})", name, cells[index])
                values.append(number)
    return np.array(values).reshape(-1, len(names))


def _number(cell: Any) -> float | None:
    """The number in a cell, None where it holds no finite one."""
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(cell, str) and ("_" in cell or not cell.isascii()):  # Python alone reads 1_000 and ١
        return None
    return number if math.isfinite(number) else None


def _refuse(place: str, column: str, cell: Any) -> NoReturn:
    hint = ""
    if isinstance(cell, str) and _number(cell.replace(",", ".")) is not None:
        hint = " Decimals are written with a point."
    elif isinstance(cell, str) and any(letter.isalpha() for letter in cell):
        hint = " A column that is not numeric is left out by naming the others: data.features=[…]."
    raise ValueError(f"{place}, column {column!r} must be a finite number, got {cell!r}.{hint}")


def _read_parquet(path: str, file: Path, names: Sequence[str]) -> Array:
    with _pyarrow(path) as pyarrow:
        table = pyarrow.parquet.read_table(file, columns=list(names))
        values = np.empty((table.num_rows, len(names)))
        for index, name in enumerate(names):
            column = table.column(name)
            try:
                values[:, index] = column.cast(pyarrow.float64()).to_numpy()
            except pyarrow.ArrowException:  # a cell that is no number: which?
                values[:, index] = [_number(cell) for cell in column.to_pylist()]
            for row in np.flatnonzero(~np.isfinite(values[:, index])).tolist():
                _refuse(f"{path}, row {row + 1}", name, column[row].as_py())
    return values


@contextlib.contextmanager
def _pyarrow(path: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} cannot be read. This is because Parquet needs pyarrow: pip install 'downslope[parquet]'."
        ) from error
    try:
        yield pyarrow
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
