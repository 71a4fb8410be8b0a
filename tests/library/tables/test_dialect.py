"""The same little table in every dialect, read back to the same numbers, and said where that is not the usual."""

import gzip
import itertools
from pathlib import Path

import pyarrow as pa
import pytest

from downslope.tables.table import read_table

ROWS = ((1234.5, 0.25), (-7.0, 1e-3), (2000000.0, 12.0), (0.5, 3.0))
DELIMITERS = {",": "", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
ENCODINGS = {"utf-8": "", "utf-8-sig": "", "utf-16": "UTF-16", "windows-1252": "Windows-1252"}
MARKS = {(".", ""): "", (",", ""): "decimal comma", (",", "."): "decimal comma, '.' between thousands"}


def spelled(number: float, decimal: str, thousands: str) -> str:
    return f"{number:{',' if thousands else ''}}".translate({ord("."): decimal, ord(","): thousands})


@pytest.mark.parametrize(
    ("delimiter", "encoding", "marks"),
    [each for each in itertools.product(DELIMITERS, ENCODINGS, MARKS) if not (each[0] == "," and each[2][0] == ",")],
)
def test_every_dialect_is_found_and_said(tmp_path: Path, delimiter: str, encoding: str, marks: tuple[str, str]) -> None:
    lines = [delimiter.join(["größe", "y"]), *(delimiter.join(spelled(cell, *marks) for cell in row) for row in ROWS)]
    (tmp_path / "t.txt").write_bytes("\r\n".join([*lines, ""]).encode(encoding))
    table = read_table(str(tmp_path / "t.txt"), "y")
    assert table.feature_names == ("größe",)
    assert list(zip(table.features[:, 0], table.target, strict=True)) == list(ROWS)
    said = [each for each in (DELIMITERS[delimiter], ENCODINGS[encoding], MARKS[marks]) if each]
    assert table.notes == ((", ".join(said),) if said else ())


@pytest.mark.parametrize(
    ("text", "names", "features"),
    [
        ("# made by hand\na,y\n1,2\n# more\n3,4\n", ("a",), [1, 3]),
        ("# a y\n1 2\n3 4\n", ("a",), [1, 3]),  # numpy.savetxt
        ("#1,y\n1,2\n", ("#1",), [1]),
        ("a  y\n 1   2\n3 4\n", ("a",), [1, 3]),
        ("a y\nfirst 1 2\nsecond 3 4\n", ("a",), [1, 3]),  # R's write.table: a name less than cells
        (',"a","y"\n"1",1,2\n"2",3,4\n', ("a",), [1, 3]),  # R's write.csv, pandas' to_csv
        ("'a, b','y'\n'1','2'\n", ("a, b",), [1]),
        ('a,y\n"1,234",2\n"12,345,678",2\n', ("a",), [1234, 12345678]),
        ("a;y\n1 234,5;2\n", ("a",), [1234.5]),
        ("a;y\n1'234.5;2\n", ("a",), [1234.5]),
        ("a,y\r1,2\r", ("a",), [1]),
        ("a,y\n+1,2\n  3 ,2\n", ("a",), [1, 3]),
    ],
)
def test_comments_names_and_grouped_digits(
    tmp_path: Path, text: str, names: tuple[str, ...], features: list[float]
) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode())
    table = read_table(str(tmp_path / "t.csv"), "y")
    assert table.feature_names == names
    assert table.features[:, 0].tolist() == features


def test_a_mark_is_never_taken_for_another(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    for text in ("a;y\n10,250;1\n", "a\ty\n10,250\t1\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"may be 10250 or 10\.250"):
            read_table(str(file), "y")
        assert read_table(str(file), "y", decimal=",").features.tolist() == [[10.25]]
        assert read_table(str(file), "y", decimal=".").features.tolist() == [[10250]]


def test_compressed_files_are_known_by_their_bytes(tmp_path: Path) -> None:
    text = b"a,y\n1,2\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text))
    with pa.output_stream(str(tmp_path / "t.zst"), compression="zstd") as stream:
        stream.write(text)
    for name in ("t.csv.gz", "t.zst"):
        assert read_table(str(tmp_path / name), "y").features.tolist() == [[1]]


def test_a_dialect_is_judged_by_the_beginning_and_a_later_letter_of_another_encoding_is_seen(tmp_path: Path) -> None:
    lines = ["city,y", *["Ulm,1"] * 60_000, "Köln,2"]
    (tmp_path / "t.csv").write_bytes("\n".join(lines).encode("windows-1252"))
    table = read_table(str(tmp_path / "t.csv"), "y")
    assert table.feature_names == ("city=Köln", "city=Ulm")
    assert table.features.sum(axis=0).tolist() == [1, 60_000]
