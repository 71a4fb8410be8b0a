"""Files as blocks of columns: CSV in any dialect and Parquet, plain or compressed, one or many of the same columns."""

import contextlib
import glob
import importlib.util
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from downslope.tables.dialect import Dialect, compression_of, find_dialect

PACKAGE_PREFIX = "pkg://"
BLOCK = 2**18  # bytes of a CSV file that are parsed at a time
BUFFER = 2**16  # bytes of a column of a Parquet file
ROWS = 2**13  # of a Parquet file
MISSING = (
    "", "NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NaN", "nan", "NAN", "-nan", "-NaN", "NaT", "NULL", "null", "Null",
    "None", "?", ".", "-", "--",
)  # fmt: skip

Block = Any  # an Arrow record batch, or a list of NumPy arrays


class TableFile:
    """A file that holds a table.

    Attributes:
        names: Of its columns.
        said: What is not usual about it, for people.
        marks: The decimal mark, and what groups thousands.
        is_plain: Whether it holds nothing but numbers.
    """

    said, marks, is_plain = "", (".", ""), False

    def __init__(self, path: str, names: Sequence[str]) -> None:
        self.path, self.names = path, list(names)

    def blocks(self, columns: Sequence[int], numbers: Sequence[int] = ()) -> Iterator[Block]:
        """Yields some rows after others, as arrays of the columns asked for; `numbers` are read as such at once."""
        raise NotImplementedError

    def place(self, row: int) -> str:
        """Says where the row, counted from 0, stands in the file."""
        return f"{self.path}, row {row + 1}"


def resolve(path: str) -> list[Path]:
    """Returns the files that `data.path` names.

    Raises:
        ValueError: There are none, or one is not a regular file.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(f"`data.path` must name a CSV or Parquet file, got {path!r}.")
    if path.startswith(PACKAGE_PREFIX):
        files = [_in_package(path)]
    elif glob.has_magic(path) and not Path(path).exists():
        found = glob.glob(str(Path(path).expanduser()), recursive=True)  # noqa: PTH207
        files = [Path(each) for each in sorted(found)]
    else:
        files = [Path(path).expanduser()]
    if not files or not all(file.is_file() for file in files):
        what = (
            "a folder: name its files by data.path='folder/*.csv'"
            if files and files[0].is_dir()
            else "there is no such file"
        )
        if "://" in path and not path.startswith(PACKAGE_PREFIX):
            what = "nothing is fetched from an address"
        raise ValueError(f"`data.path` must name a CSV or Parquet file, got {path!r}: {what}.")
    return files


def open_table(path: str, decimal: str | None = None) -> TableFile:
    """Opens what `data.path` names and reads its names.

    Raises:
        ValueError: It is no table, or the files' columns are not the same.
    """
    files = resolve(path)
    if path.startswith(PACKAGE_PREFIX):
        with contextlib.suppress(ValueError):
            return PackagedFile(path, files[0])
    tables = [_open(path if len(files) == 1 else str(file), file, decimal) for file in files]
    return tables[0] if len(tables) == 1 else ManyFiles(path, tables)


def _open(path: str, file: Path, decimal: str | None) -> TableFile:
    with file.open("rb") as stream:
        is_parquet = stream.read(4) == b"PAR1" or file.suffix.lower() in {".parquet", ".pq"}
    return ParquetFile(path, file) if is_parquet else CsvFile(path, file, decimal)


def _in_package(path: str) -> Path:
    """The file, found without importing its package, which would run it."""
    package, _, name = path.removeprefix(PACKAGE_PREFIX).partition("/")
    root, *inner = package.split(".")
    spec = importlib.util.find_spec(root) if root else None
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0], *inner, name) if folders else Path(path)


class PackagedFile(TableFile):
    """Plain numbers between commas, as a package ships them: read by numpy, which is imported anyway."""

    is_plain = True

    def __init__(self, path: str, file: Path) -> None:
        with file.open(encoding="utf-8") as lines:
            super().__init__(path, next(lines, "").rstrip("\n").split(","))
            self._values = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
        if len(self.names) != self._values.shape[1] or not np.isfinite(self._values).all():
            raise ValueError(f"{path} is more than plain numbers.")

    def blocks(self, columns: Sequence[int], numbers: Sequence[int] = ()) -> Iterator[Block]:
        """Yields all rows."""
        yield self._values[:, columns].T


class CsvFile(TableFile):
    """A text file: its cells come as strings, but for the columns that are asked for as numbers."""

    dialect: Dialect

    def __init__(self, path: str, file: Path, decimal: str | None = None) -> None:
        super().__init__(path, ())
        self.file, self.compression = file, compression_of(path, file)
        with self._reading():
            self.dialect = find_dialect(path, self._stream(), decimal)
        self.names, self.said = list(self.dialect.header), self.dialect.description()
        self.marks = self.dialect.decimal, self.dialect.thousands

    def _stream(self) -> Any:
        import pyarrow

        return pyarrow.input_stream(str(self.file), compression=self.compression)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, EOFError, UnicodeError) as error:
            self._explain(" ".join(str(error).split()))

    def _explain(self, message: str) -> NoReturn:
        """Raises what is wrong with the file: a row of another length, where there is one."""
        with contextlib.suppress(OSError, UnicodeError):
            for row, (line, cells) in enumerate(self._rows()):
                if len(cells) != len(self.names):
                    place = f"{self.path}, row {row + 1} (line {line})"
                    raise ValueError(f"{place} must hold {len(self.names)} cells like the header, got {len(cells)}.")
        raise ValueError(f"{self.path} cannot be read as CSV: {message[:200]}")

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yields line and cells of each row, slowly: the csv module's view, for messages."""
        number = 0

        def lines(dialect: Dialect) -> Iterator[str]:
            nonlocal number
            for number, line in dialect.lines(self._stream()):  # noqa: B007
                yield line

        if hasattr(self, "dialect"):
            yield from ((number, cells) for cells in self.dialect.rows(lines(self.dialect)) if cells)

    def place(self, row: int) -> str:
        """Says path, row and line, counted from 1."""
        line, _ = next(itertools.islice(self._rows(), row, None))
        return f"{self.path}, row {row + 1} (line {line})"

    def blocks(self, columns: Sequence[int], numbers: Sequence[int] = ()) -> Iterator[Block]:
        """Yields arrays of strings, of doubles for `numbers`; missing cells are null in both."""
        import pyarrow
        from pyarrow import csv

        dialect, names = self.dialect, [str(column) for column in range(len(self.names))]
        if dialect.comments or dialect.delimiter == " ":
            stream, skipped = pyarrow.PythonFile(_Lines(dialect.lines(self._stream())), mode="r"), 0
        else:
            stream, skipped = self._stream(), dialect.num_lines
            if not dialect.encoding.startswith("utf-8"):
                stream = pyarrow.transcoding_input_stream(stream, dialect.encoding, "utf-8")
        size = max(BLOCK * (2 if numbers else 1), 4 * dialect.longest)
        types = {str(column): pyarrow.float64() if column in numbers else pyarrow.string() for column in columns}
        with self._reading():
            try:
                reader = csv.open_csv(
                    stream,
                    csv.ReadOptions(
                        column_names=names,
                        skip_rows=skipped,
                        block_size=size,
                    ),
                    csv.ParseOptions(delimiter=dialect.delimiter, quote_char=dialect.quote, newlines_in_values=True),
                    csv.ConvertOptions(
                        column_types=types,
                        include_columns=list(types),
                        null_values=list(MISSING),
                        strings_can_be_null=True,
                        decimal_point=dialect.decimal,
                    ),
                )
            except pyarrow.ArrowInvalid as error:
                if "Empty CSV" in str(error):
                    return
                raise
            yield from reader


class _Lines(io.RawIOBase):
    """Lines as a file to read from."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines

    def read(self, _: int = -1) -> bytes:
        return "".join(line for _, line in itertools.islice(self._lines, 1000)).encode()

    def readable(self) -> bool:
        return True


class ParquetFile(TableFile):
    """A Parquet file: its columns come as they are typed there."""

    def __init__(self, path: str, file: Path) -> None:
        super().__init__(path, ())
        self.file = file
        with self._opened() as parquet:
            self.names = list(parquet.schema_arrow.names)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.file, pre_buffer=False, buffer_size=BUFFER) as opened:
                yield opened
        except (pyarrow.ArrowException, OSError, UnicodeError) as error:
            raise ValueError(f"{self.path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error

    def blocks(self, columns: Sequence[int], numbers: Sequence[int] = ()) -> Iterator[Block]:
        """Yields arrays of the file's own types."""
        names = [self.names[column] for column in columns]
        with self._opened() as opened:
            for batch in opened.iter_batches(ROWS, columns=names, use_threads=False):
                yield batch.select(names)


class ManyFiles(TableFile):
    """Files of the same columns, one after the other."""

    def __init__(self, path: str, files: list[TableFile]) -> None:
        super().__init__(path, files[0].names)
        self.files, self.said = files, f"{len(files)} files"
        for each in files:
            if each.names != self.names:
                raise ValueError(
                    f"{path} must name files with the same columns, got ({', '.join(self.names)}) and "
                    f"({', '.join(each.names)})."
                )
        if len({each.marks[0] for each in files}) > 1:
            raise ValueError(
                f"{path} must name files with the same decimal mark, got '.' and ',': data.decimal=… says which."
            )
        self.marks = files[0].marks[0], max(each.marks[1] for each in files)
        self._starts: list[int] = []

    def blocks(self, columns: Sequence[int], numbers: Sequence[int] = ()) -> Iterator[Block]:
        """Yields the blocks of each file."""
        row, self._starts = 0, []
        for file in self.files:
            self._starts.append(row)
            for block in file.blocks(columns, numbers):
                row += len(block[0])
                yield block

    def place(self, row: int) -> str:
        """Says file and row within it."""
        number = max(index for index, start in enumerate(self._starts) if start <= row)
        return self.files[number].place(row - self._starts[number])
