import csv
import io
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from downslope.tables.columns import Column
from downslope.tables.table import read_features, read_table


def write(folder: Path, text: str | bytes, name: str = "table.csv") -> str:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(file)


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b,y\n1,2,3\n4,5,6\n")
    table = read_table(path, target="y", features=["b", "a"])
    assert table.features.tolist() == [[2, 1], [5, 4]]
    assert table.target.tolist() == [3, 6]
    assert table.feature_names == ("b", "a")
    assert table.name == "table"
    assert table.notes == ()


def test_features_are_all_columns_but_the_target(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "y,a,b\n3,1,2\n"), target="y")
    assert table.feature_names == ("a", "b")
    assert table.features.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "text",
    [
        'house size,"price, in €",straße\n1,2,3\n',
        'house size;"price, in €";straße\n1;2;3\n',
        'house size\t"price, in €"\tstraße\n1\t2\t3\n',
        '\ufeffhouse size,"price, in €",straße\r\n1,2,3\r\n',
        'house size,"price, in €",straße\n\n"1","2","3"',
    ],
    ids=[
        "comma",
        "semicolon",
        "tab",
        "byte-order mark and CRLF",
        "quoted cells, blank line, no last newline",
    ],
)
def test_headers_and_separators(tmp_path: Path, text: str) -> None:
    table = read_table(write(tmp_path, text), target="price, in €")
    assert table.feature_names == ("house size", "straße")
    assert table.features.tolist() == [[1, 3]]
    assert table.target.tolist() == [2]


def test_a_header_may_span_lines(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, '"a\nb",y\n1,2\n'), target="y")
    assert table.feature_names == ("a\nb",)
    assert table.target.tolist() == [2]


def test_a_hash_is_no_comment(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "#1,y\n1,2\n"), target="y").feature_names == ("#1",)


def test_columns_left_out_may_hold_anything(tmp_path: Path) -> None:
    path = write(tmp_path, "city,size,y\nParis,1,2\n,3,4\n")
    assert read_table(path, target="y", features=["size"]).features.tolist() == [[1], [3]]


def test_doubles_survive(tmp_path: Path) -> None:
    path = write(tmp_path, "a,y\n20260101123456,0.1\n")
    assert read_table(path, target="y").features[0, 0] == 20260101123456.0
    assert read_table(path, target="y").target[0] == 0.1


def test_the_table_is_read_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path, "a,y\n1,2\n")
    first = read_table(path, target="y")
    assert read_table(path, target="y") is first
    write(tmp_path, "a,y\n10,20\n")
    assert read_table(path, target="y").features.tolist() == [[10]]


def test_the_table_cannot_be_written(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a,y\n1,2\n"), target="y")
    with pytest.raises(ValueError, match="read-only"):
        table.features[0, 0] = 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must start with a line of column names"),
        ("\n1,2\n", "must start with a line of column names"),
        ("a,y\n", "must hold rows below its header, got none"),
        ("a,y\n1,nan\n", "'y' must be a column of numbers, got none"),
        ("a,y\n1,\n,2\n", "must hold rows below its header, got 2 with a missing cell in each"),
        ("a,y\n1,2\ninf,3\n", "row 2 (line 3), column 'a' must be a finite number, got 'inf'"),
        ("a,y\n1,2\n1e999,3\n", "row 2 (line 3), column 'a' must be a finite number, got '1e999'"),
        ("a,y\n1,2\n9007199254740993,3\n", "row 2 (line 3), column 'a' must be a number that float64 holds exactly"),
        (
            "a,y\n" + 10 * "1,2\n\n" + "red,3\n",
            "row 11 (line 22), column 'a' must be a finite number, got 'red': 1 of 11",
        ),
        ("a;y\n" + 10 * "1,5;3\n" + "1.5;3\n", "row 11 (line 12), column 'a' must be a finite number, got '1.5'"),
        ("a;y\n10,250;3\n", "holds '10,250', which may be 10250 or 10.250: data.decimal='.' or data.decimal=','"),
        ("a,y\n1,2\n1\n", "row 2 (line 3) must hold 2 cells like the header, got 1"),
        ("a,y\n1,2\n1,2,3\n", "row 2 (line 3) must hold 2 cells like the header, got 3"),
        ("a,b\n1,2\n", "`target` must be a column of"),
        ("a,a,y\n1,2,3\n", "must name each column once, got 'a' 2 times"),
        ("y\n1\n", "must hold a column beside the target y"),
        (
            "a,y\n1,red\n2,blue\n",
            "'y' must be a column of numbers, got text (blue, red). If these are classes: make new",
        ),
        (b"a,y\n\x81,2\n", "must be text in UTF-8, UTF-16 or Windows-1252"),
        (b"PK\x03\x04\x00\x00\x9c\xff", "a spreadsheet: save it as CSV"),
        (b"\xd0\xcf\x11\xe0\x00", "an Excel file: save it as CSV"),
        (b"\x1f\x8b\x08\x00", "cannot be read as CSV"),
    ],
)
def test_refusals_say_where(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_table(path, target="y")
    assert "table.csv" in str(error.value)


def test_unknown_and_doubled_features_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b,y\n1,2,3\n")
    with pytest.raises(ValueError, match=r"`features` must be columns of .*\(a, b, y\), got 'c'"):
        read_table(path, target="y", features=["a", "c"])
    with pytest.raises(ValueError, match="got 'a' again"):
        read_table(path, target="y", features=["a", "a"])
    with pytest.raises(ValueError, match="got 'y' again"):
        read_table(path, target="y", features=["a", "y"])


@pytest.mark.parametrize("path", ["missing.csv", "", "."])
def test_a_path_that_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"`data.path` must name a CSV or Parquet file"):
        read_table(path, target="y")


def test_parquet_reads_like_csv(tmp_path: Path) -> None:
    columns = {"size": [1, 2], "price": [0.5, 1.5], "new": [True, False], "city": ["Paris", "Rome"]}
    parquet.write_table(pa.table(columns), tmp_path / "houses.parquet")
    table = read_table(str(tmp_path / "houses.parquet"), target="price", features=["new", "size"])
    assert table.features.tolist() == [[1, 1], [0, 2]]
    assert table.target.tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1.0, None], "row 2, column 'a' must be a finite number, got none: 1 of 2 cells are missing"),
        ([1.0, math.nan], "row 2, column 'a' must be a finite number, got none"),
        ([math.inf, 1.0], "row 1, column 'a' must be a finite number, got inf"),
        (["1", "red"], "row 2, column 'a' must be a finite number, got 'red': 1 of 2 cells"),
        ([1, 2**60 + 1], "row 2, column 'a' must be a number that float64 holds exactly"),
    ],
)
def test_parquet_refusals_say_where(tmp_path: Path, column: list[object], message: str) -> None:
    parquet.write_table(pa.table({"a": column, "y": [1.0, 2.0]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_table(str(tmp_path / "t.parquet"), target="y", text="refuse", missing="refuse")


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_table(write(tmp_path, "a,y\n1,2\n", "t.parquet"), target="y")


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    parquet.write_table(
        pa.table({"a": pa.array([], pa.float64()), "y": pa.array([], pa.int64())}), tmp_path / "t.parquet"
    )
    with pytest.raises(ValueError, match="must hold rows below its header, got none"):
        read_table(str(tmp_path / "t.parquet"), target="y")
    with pytest.raises(ValueError, match="must hold rows below its header, got none"):
        read_features(str(tmp_path / "t.parquet"), [Column("a")], "drop")


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    names=st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=4, unique_by=str.strip),
    rows=st.lists(st.lists(finite, min_size=4, max_size=4), min_size=1, max_size=5),
    delimiter=st.sampled_from(",;\t"),
)
def test_what_the_csv_module_writes_is_read_back(
    tmp_path: Path, names: list[str], rows: list[list[float]], delimiter: str
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerow(names)
    writer.writerows(row[: len(names)] for row in rows)
    try:
        path = write(tmp_path, text.getvalue())
        values = read_features(path, [Column(name.strip()) for name in names], "refuse")
    except (UnicodeEncodeError, ValueError):  # lone surrogates, blank names, whole numbers beyond 2^53
        return
    assert np.array_equal(values, np.array([row[: len(names)] for row in rows]))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.one_of(st.binary(max_size=60), st.text(alphabet='ay,;\t"\n\r.1e-naif ', max_size=40).map(str.encode)))
def test_any_bytes_are_a_table_of_finite_numbers_or_a_refusal(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, b"a,y\n" + content)
    try:
        table = read_table(path, target="y")
    except ValueError as error:
        assert "table.csv" in str(error)
    else:
        assert len(table)
        assert np.isfinite(table.features).all()
        assert np.isfinite(table.target).all()


def test_the_shipped_table_is_read_without_pyarrow() -> None:
    code = (
        "import sys; from downslope.tables.table import read_table;"
        "print(len(read_table('pkg://template.regression/diabetes.csv', 'progression')), 'pyarrow' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "442 False\n"
