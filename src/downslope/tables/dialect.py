"""How a text file writes its table, found by looking at its beginning: encoding, separators, decimal mark, comments."""

import codecs
import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

HEAD = 2**18  # bytes that the dialect is judged by
ENCODED = 2**26  # and the encoding
LINES = 500  # that separators and marks are judged by
CELLS = 10_000
NAMES = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces", ",": "commas"}
ENCODINGS = {"utf-16": "UTF-16", "windows-1252": "Windows-1252"}
SPELLED = re.compile(r"[+-]?[\d.,'’ \u00a0\u202f]+([eE][+-]?\d+)?")
THOUSANDS = (",", ".", "'", "’", " ", "\u00a0", "\u202f")
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
NO_TABLE = {
    b"PK\x03\x04": "a ZIP archive or a spreadsheet: save it as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel file: save it as CSV",
    b"\xfd7zXZ": "an xz archive: unpack it",
    b"ARROW1": "an Arrow file: write it as Parquet",
}


@dataclass(frozen=True)
class Dialect:
    """How the cells of a text file are to be told apart and read.

    Attributes:
        header: The names of the columns; in a file of R's with one name less than cells, `rownames` before them.
        encoding: What its bytes stand for.
        delimiter: What separates cells; of spaces, any number.
        quote: What a cell with a separator in it is put between.
        decimal: The decimal mark.
        thousands: What groups digits by three, empty where nothing does.
        comments: Whether lines that begin with # are not part of the table.
        num_lines: Lines down to the header.
        longest: Bytes of the longest line that was seen.
    """

    header: tuple[str, ...] = field(repr=False)
    encoding: str = "utf-8"
    delimiter: str = ","
    quote: str = '"'
    decimal: str = "."
    thousands: str = ""
    comments: bool = False
    num_lines: int = 1
    longest: int = 0

    def description(self) -> str:
        """Says what is not usual, empty for commas, decimal points and UTF-8."""
        said = [NAMES[self.delimiter]] if self.delimiter != "," else []
        said += [ENCODINGS[self.encoding]] if self.encoding in ENCODINGS else []
        said += ["decimal comma"] if self.decimal == "," else []
        said += [f"{self.thousands!r} between thousands"] if self.thousands else []
        return ", ".join(said + (["comment lines"] if self.comments else []))

    def lines(self, stream: Iterable[bytes]) -> Iterator[tuple[int, str]]:
        """Yields the lines below the header with their numbers, as the csv module can split them."""
        text = io.TextIOWrapper(stream, self.encoding, newline="")  # type: ignore[type-var]
        for number, line in enumerate(text, start=1):
            if number > self.num_lines and not (self.comments and line.startswith("#")):
                yield number, (line if self.delimiter != " " else single_spaced(line))

    def rows(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """Splits lines into cells."""
        return csv.reader(lines, delimiter=self.delimiter, quotechar=self.quote)


def single_spaced(line: str) -> str:
    """Returns a line with one space wherever there are blanks, and none at its ends."""
    return " ".join(line.split()) + "\n"


def compression_of(path: str, file: Path) -> str | None:
    """Tells how a file is compressed, by its first bytes.

    Raises:
        ValueError: It is a spreadsheet or an archive.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
    for magic, what in NO_TABLE.items():
        if start.startswith(magic):
            raise ValueError(f"{path} must be a CSV or Parquet file (CSV is text in UTF-8): it is {what}.")
    return next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)


def find_dialect(path: str, stream: BinaryIO, decimal: str | None = None) -> Dialect:
    """Looks at the beginning of a text file.

    Args:
        path: The file's name, for messages.
        stream: The file from its beginning, not compressed any more.
        decimal: The decimal mark; found when None.

    Raises:
        ValueError: It has no line of names, is no text, or its numbers can be read in two ways.
    """
    head = stream.read(HEAD)
    while (
        (more := head.count(b"\n") + head.count(b"\r") < 2 and stream.read(HEAD))
        and b"\0" not in head
        and len(head) < ENCODED
    ):
        head += more  # a line of many thousand names
    is_whole = len(head) % HEAD > 0
    encoding = _encoding(path, head, stream)
    text = codecs.getincrementaldecoder(encoding)().decode(head, final=False)
    lines = list(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    lines = lines if is_whole or len(lines) == 1 else lines[:-1]
    if not lines or not lines[0].strip():
        raise ValueError(f"{path} must start with a line of column names, got an empty file or line.")
    num_commented = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    try:
        return _judged(path, lines, num_commented, encoding, decimal)
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}.") from error


def _judged(path: str, lines: list[str], num_commented: int, encoding: str, decimal: str | None) -> Dialect:
    """The dialect of lines that are text."""
    plain = [line for line in lines[num_commented:] if not line.startswith("#")][:LINES]
    quote = "'" if re.match(r"\s*'[^']*'", (plain or lines)[0]) else '"'
    delimiter = _delimiter(plain or [line.lstrip("# ") for line in lines[:1]], quote)
    named = Dialect((), delimiter=delimiter, quote=quote)
    if delimiter == " ":
        plain = [single_spaced(line) for line in plain]
    cells = [row for row in named.rows(plain) if row]
    names = cells[0] if cells else []
    is_above = False
    if num_commented:  # a name that begins with #, or numpy.savetxt's header
        last = lines[num_commented - 1].removeprefix("# ")
        above = next(named.rows([single_spaced(last) if delimiter == " " else last]), [])
        is_above = not cells or (
            len(above) == len(cells[-1]) and (_is_of_numbers(names) or not _is_of_numbers(cells[-1]))
        )
        names = above if is_above else names
    rows, num_lines = (cells, num_commented) if is_above else (cells[1:], num_commented + 1)
    if not is_above and cells:  # quoted names may span lines
        reader = csv.reader(plain, delimiter=delimiter, quotechar=quote)
        next(row for row in reader if row)
        num_lines += reader.line_num - 1
    if not any(name.strip() for name in names):
        raise ValueError(f"{path} must start with a line of column names, got an empty file or line.")
    if rows and {len(row) for row in rows[:-1] or rows} == {len(names) + 1}:
        names = ["rownames", *names]
    hashed = [line for line in lines[num_lines:] if line.startswith("#")]
    odd = any(len(row) != len(names) for row in named.rows(hashed))
    judged = itertools.islice(itertools.chain.from_iterable(rows), CELLS)
    mark, thousands = _marks(path, [cell.strip() for cell in judged], delimiter, decimal)
    return Dialect(
        header=tuple(name.strip() for name in names),
        encoding=encoding,
        delimiter=delimiter,
        quote=quote,
        decimal=mark,
        thousands=thousands,
        comments=num_commented > is_above or odd,
        num_lines=num_lines,
        longest=4 * max(map(len, lines)),
    )


def _encoding(path: str, head: bytes, stream: BinaryIO) -> str:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head:
        raise ValueError(f"{path} must be text in UTF-8, UTF-16 or Windows-1252, or a Parquet file: it has zero bytes.")
    decoder, piece, num_bytes = codecs.getincrementaldecoder("utf-8")(), head, 0
    try:
        while piece and num_bytes < ENCODED:
            decoder.decode(piece)
            num_bytes += len(piece)
            piece = stream.read(HEAD)
        decoder.decode(b"", final=not piece)
    except UnicodeDecodeError:
        try:
            head.decode("windows-1252")
        except UnicodeDecodeError as error:
            position = f"got another byte at position {error.start}"
            raise ValueError(f"{path} must be text in UTF-8, UTF-16 or Windows-1252, {position}.") from error
        return "windows-1252"
    return "utf-8-sig" if head.startswith(codecs.BOM_UTF8) else "utf-8"


def _delimiter(lines: list[str], quote: str) -> str:
    """Splits header and rows into as many cells, and into the most."""

    def score(delimiter: str) -> tuple[bool, bool, bool, float, int]:
        split = [single_spaced(line) for line in lines] if delimiter == " " else lines
        rows = [row for row in csv.reader(split, delimiter=delimiter, quotechar=quote) if row]
        width, count = Counter(map(len, rows[1:] or rows)).most_common(1)[0] if rows else (0, 0)
        names = len(rows[0]) if rows else 0
        fits = names in (width, width - 1)
        return delimiter != " " and names > 1, names > 1 and fits, names == width, count / max(len(rows), 1), width

    return max(NAMES if not lines[0].count(",") else ",;\t| ", key=score)


def _is_of_numbers(cells: list[str]) -> bool:
    return all(re.fullmatch(r"\s*[+-]?[\d.,]+([eE][+-]?\d+)?\s*", cell) for cell in cells)


def _marks(path: str, cells: list[str], delimiter: str, given: str | None) -> tuple[str, str]:
    """The decimal mark and what groups thousands. What can be read in two ways is refused."""
    numbers = [cell for cell in cells if SPELLED.fullmatch(cell)]
    if not given and set("".join(numbers)).isdisjoint(set(THOUSANDS) - {"."}):
        return ".", ""

    def grouped(mark: str, decimal: str = "") -> list[str]:
        tail = rf"([{re.escape(decimal)}]\d*)?" if decimal else ""
        shape = re.compile(rf"[+-]?[1-9]\d{{0,2}}([{re.escape(mark)}]\d{{3}})+{tail}")
        return [cell for cell in numbers if shape.fullmatch(cell)]

    def decimals(mark: str) -> int:
        """How many cells show a mark that no grouping explains."""
        whole = rf"(\d*|\d{{1,3}}([^\d{re.escape(mark)}]\d{{3}})+)"
        shape = re.compile(rf"[+-]?{whole}[{re.escape(mark)}]\d*([eE][+-]?\d+)?")
        return sum(bool(shape.fullmatch(cell)) for cell in numbers) - sum(
            cell.count(mark) == 1 for cell in grouped(mark)
        )

    decimal = given or ("," if decimals(",") > decimals(".") else ".")
    if not given and decimal == "." and delimiter != "," and not decimals("."):
        commas = grouped(",")
        if commas and all(cell.count(",") == 1 for cell in commas):
            whole, part = commas[0].split(",")
            raise ValueError(
                f"{path} holds {commas[0]!r}, which may be {whole}{part} or {whole}.{part}: data.decimal='.' or "
                "data.decimal=',' says what a decimal is written with."
            )
    groups = [mark for mark in THOUSANDS if mark not in (decimal, delimiter) and grouped(mark, decimal)]
    if delimiter == "," and decimal == "." and grouped(",", "."):
        groups = [","]
    return decimal, groups[0] if groups else ""
