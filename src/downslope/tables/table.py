"""A table of finite numbers, read from the user's file: every cell is checked, and a refusal names it."""

import csv
import functools
import hashlib
import importlib.util
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PACKAGE_PREFIX = "pkg://"
DELIMITERS = ",;\t"


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of finite numbers with names.

    Attributes:
        name: Where it came from, for people.
        features: One row a sample, one column a feature; read-only.
        target: One value a row; read-only.
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
    try:
        header = _parquet_schema(path, file) if _is_parquet(file) else _csv_header(path, file)[1]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got another byte at position {error.start}.") from error
    for name in header:
        if not name:
            raise ValueError(f"{path} must name every column in its first line, got an empty name in {header}.")
        if header.count(name) > 1:
            raise ValueError(f"{path} must name each column once, got {name!r} {header.count(name)} times.")
    return header


def read_columns(path: str, names: Sequence[str]) -> Array:
    """Reads columns of a file, in the order of the names; other columns may hold anything.

    Args:
        path: As for `read_table`.
        names: Names out of `column_names(path)`.

    Returns:
        One row a row of the file, one column a name.

    Raises:
        ValueError: There is no row, or a cell is not a finite number.
    """
    file = _resolve(path)
    try:
        values = (_read_parquet if _is_parquet(file) else _read_csv)(path, file, list(names))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got another byte at position {error.start}.") from error
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


def _csv_header(path: str, file: Path) -> tuple[str, list[str], int]:
    """The delimiter that gives the most names, the names, and the number of lines they take up."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        first = lines.readline()
        if not first.strip():
            raise ValueError(f"{path} must start with a line of column names, got an empty file or line.")
        try:
            delimiter = max(DELIMITERS, key=lambda candidate: len(next(csv.reader([first], delimiter=candidate))))
            lines.seek(0)
            reader = csv.reader(lines, delimiter=delimiter)
            return delimiter, [name.strip() for name in next(reader)], reader.line_num
        except csv.Error as error:
            raise ValueError(f"{path} must start with a line of column names: {error}.") from error


def _read_csv(path: str, file: Path, names: list[str]) -> Array:
    delimiter, header, header_lines = _csv_header(path, file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "input contained no data": refused by the caller
            values = np.loadtxt(
                file,
                delimiter=delimiter,
                skiprows=header_lines,
                usecols=[header.index(name) for name in names],
                ndmin=2,
                quotechar='"',
                comments=None,
                encoding="utf-8-sig",
            )
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        _explain_csv(path, file, delimiter, header, names)
        raise ValueError(f"{path} must be a table of numbers: {error}.") from error
    if not (_is_even(file, delimiter, len(header)) and np.isfinite(values).all()):
        _explain_csv(path, file, delimiter, header, names)
    return values


def _is_even(file: Path, delimiter: str, num_columns: int) -> bool:
    """Tells whether each line has a cell a column: numpy passes over surplus ones, such as 1,5 for 1.5 makes.

    False also for a separator or a line break within quotes, where only the slow reader can tell.
    """
    with file.open(encoding="utf-8-sig") as lines:
        return all(line.count(delimiter) == num_columns - 1 for line in lines if not line.isspace())


def _explain_csv(path: str, file: Path, delimiter: str, header: list[str], names: list[str]) -> None:
    """Raises for the first cell that is not a finite number: slow, so only once the fast reader has failed."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter)
        next(reader)
        for row, cells in enumerate((cells for cells in reader if cells), start=1):
            place = f"{path}, row {row} (line {reader.line_num})"
            if len(cells) != len(header):
                raise ValueError(f"{place} must hold {len(header)} cells like the header, got {len(cells)}.")
            for name in names:
                cell = cells[header.index(name)]
                if not _is_finite(cell):
                    _refuse(place, name, cell)


def _is_finite(cell: str) -> bool:
    try:  # Python reads 1_000 and ١, numpy's reader does not
        return math.isfinite(float(cell)) and cell.isascii() and "_" not in cell
    except ValueError:
        return False


def _refuse(place: str, column: str, cell: Any) -> NoReturn:
    hint = ""
    if isinstance(cell, str) and _is_finite(cell.replace(",", ".")):
        hint = " Decimals are written with a point."
    elif isinstance(cell, str) and any(letter.isalpha() for letter in cell):
        hint = " A column that is not numeric is left out by naming the others: data.features=[…]."
    raise ValueError(f"{place}, column {column!r} must be a finite number, got {cell!r}.{hint}")


def _parquet_schema(path: str, file: Path) -> list[str]:
    pyarrow, parquet = _import_pyarrow(path)
    try:
        return list(parquet.read_schema(file).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _read_parquet(path: str, file: Path, names: list[str]) -> Array:
    pyarrow, parquet = _import_pyarrow(path)
    try:
        table = parquet.read_table(file, columns=names)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    values = np.empty((table.num_rows, len(names)))
    for index, name in enumerate(names):
        column = table.column(name)
        try:
            values[:, index] = column.cast(pyarrow.float64()).to_numpy()
        except pyarrow.ArrowException:
            cells = column.to_pylist()
            row = next((row for row, cell in enumerate(cells) if not _is_number(cell)), 0)
            _refuse(f"{path}, row {row + 1}", name, cells[row])
        for row in np.flatnonzero(~np.isfinite(values[:, index])).tolist():
            _refuse(f"{path}, row {row + 1}", name, column[row].as_py())
    return values


def _is_number(cell: Any) -> bool:
    return _is_finite(cell) if isinstance(cell, str) else isinstance(cell, int | float)


def _import_pyarrow(path: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} cannot be read. This is because Parquet needs pyarrow: pip install 'downslope[parquet]'."
        ) from error
    return pyarrow, pyarrow.parquet
