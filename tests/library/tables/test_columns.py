"""What becomes of columns: row numbers, text, dates, missing cells; and the same once more for a new file."""

import datetime
import decimal
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from downslope.tables.columns import Column
from downslope.tables.table import CLASSES, Table, read_features, read_table


def read(folder: Path, content: str, target: str | list[str] = "y", **settings: object) -> Table:
    (folder / "t.csv").write_text(content)
    table = read_table(str(folder / "t.csv"), target, **settings)  # type: ignore[arg-type]
    assert isinstance(table, Table)
    return table


@pytest.mark.parametrize("name", ["", "rownames", "Unnamed: 0", "__index_level_0__"])
def test_row_numbers_are_left_out_and_said_unless_named_or_alone(tmp_path: Path, name: str) -> None:
    text = f"{name},a,y\n1,5,2\n2,6,3\n"
    table = read(tmp_path, text)
    assert table.feature_names == ("a",)
    assert table.notes == (f"without {name or 'an unnamed one'}: row numbers",)
    if name:
        assert read(tmp_path, text, features=[name]).features.tolist() == [[1], [2]]
    assert read(tmp_path, f"{name},y\n1,2\n2,3\n").features.tolist() == [[1], [2]]


def test_columns_are_named_oddly(tmp_path: Path) -> None:
    text = '1990,"size, [m²]",élan vital,y=1\n1,2,3,4\n5,6,7,9\n'
    table = read(tmp_path, text, "y=1", features=[1990, "size, [m²]", "élan vital"], exclude=["élan vital"])
    assert table.feature_names == ("1990", "size, [m²]")
    assert table.features.tolist() == [[1, 2], [5, 6]]
    assert read(tmp_path, text, ["élan vital", "1990"]).target.tolist() == [[3, 1], [7, 5]]
    weighted = read(tmp_path, text, "y=1", weight="1990")
    assert weighted.weight is not None
    assert weighted.weight.tolist() == [1, 5]
    assert weighted.feature_names == ("size, [m²]", "élan vital")


def test_text_dates_and_booleans_become_numbers(tmp_path: Path) -> None:
    text = "city,day,german,new,y\nUlm,1970-01-02,31.12.1970,TRUE,1\nBonn,1970-01-03T12:00,01.01.1971,false,2\n"
    table = read(tmp_path, text)
    assert table.feature_names == ("city=Bonn", "city=Ulm", "day", "german", "new")
    assert table.features.tolist() == [[0, 1, 1, 364, 1], [1, 0, 2.5, 365, 0]]
    assert table.notes == ("a 0 or 1 for each value of city (2)", "days since 1970 for day, german")
    few = read(tmp_path, text, max_values=1)
    assert few.feature_names == ("day", "german", "new")
    assert few.notes[0] == "without city: text of more than 1 values"
    with pytest.raises(ValueError, match=r"row 1 \(line 2\), column 'city' must be a finite number, got 'Ulm'"):
        read(tmp_path, text, text="refuse")


def test_rows_with_missing_cells_are_left_out_or_filled_or_refused(tmp_path: Path) -> None:
    text = "a,city,y\n1,Ulm,1\nNA,Ulm,2\n3,,3\n4,Ulm,?\n5,Bonn,5\n"
    dropped = read(tmp_path, text)
    assert dropped.features[:, 0].tolist() == [1, 5]
    assert dropped.notes[-1] == "3 rows with missing cells left out"
    kept = read(tmp_path, text, missing="mean")
    np.testing.assert_array_equal(kept.features, [[1, 0, 1], [np.nan, 0, 1], [3, np.nan, np.nan], [5, 1, 0]])
    with pytest.raises(
        ValueError, match=r"row 2 \(line 3\), column 'a' must be a finite number, got none: 1 of 5 cells"
    ):
        read(tmp_path, text, missing="refuse")


def test_a_new_file_is_read_as_the_first_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = read(tmp_path, "a,city,when,new,y\n1,Ulm,1970-01-02,true,1\n2,Bonn,1970-01-03,false,2\n")
    columns = [Column.from_state_dict(column.state_dict()) for column in first.columns]
    (tmp_path / "new.csv").write_text("new;when;city;a\nFALSE;1970-01-05;Bonn;1,5\n1;1970-01-05;Rome;NA\n")
    with caplog.at_level(logging.WARNING):
        values = read_features(str(tmp_path / "new.csv"), columns, "drop")
    np.testing.assert_array_equal(values, [[1.5, 1, 0, 4, 0], [np.nan, 0, 0, 4, 1]])
    assert [message.partition("new.csv: ")[2] for message in caplog.messages[-2:]] == [
        "1 text that the run does not know: counted as none of its values.",
        "1 row with missing cells: predicted as nan.",
    ]
    (tmp_path / "new.csv").write_text("a,city,when,new\n1,Ulm,yesterday,true\n")
    with pytest.raises(ValueError, match=r"row 1 \(line 2\), column 'when' must be a date, got 'yesterday'"):
        read_features(str(tmp_path / "new.csv"), columns, "drop")


def test_parquet_of_every_type(tmp_path: Path) -> None:
    midnight = datetime.datetime(1970, 1, 3)
    columns = {
        **{kind: pa.array([1, 2], getattr(pa, kind)()) for kind in ("int8", "int64", "uint16", "uint64", "float16")},
        "float32": pa.array([1, 2], pa.float32()),
        "decimal": pa.array([decimal.Decimal("1.00"), decimal.Decimal("2.00")]),
        "boolean": pa.array([True, False]),
        "stamp": pa.array([midnight, midnight], pa.timestamp("ns")),
        "zoned": pa.array([midnight, midnight], pa.timestamp("s", "UTC")),
        "date": pa.array([midnight.date(), midnight.date()]),
        "category": pa.array(["x", "z"]).dictionary_encode(),
        "nested": pa.array([[1], [2]]),
        "y": pa.array([1.0, 2.0]),
        "__index_level_0__": pa.array([0, 1]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read_table(str(tmp_path / "t.parquet"), "y")
    assert isinstance(table, Table)
    assert table.feature_names[:11] == tuple(columns)[:11]
    assert table.features.tolist() == [[1.0] * 8 + [2.0] * 3 + [1, 0], [2.0] * 7 + [0.0] + [2.0] * 3 + [0, 1]]
    assert table.notes[:2] == ("without __index_level_0__: row numbers", "without nested: no numbers")


def test_several_files_are_one_table(tmp_path: Path) -> None:
    for name, text in {"1.csv": "a,y\n1,2\n", "2.csv": "a,y\n3,5\nred,5\n"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"2\.csv, row 2 \(line 3\), column 'a' must be a finite number, got 'red'"):
        read_table(str(tmp_path / "*.csv"), "y", text="refuse")
    (tmp_path / "2.csv").write_text("a,y\n3,5\n")
    assert read_table(str(tmp_path / "*.csv"), "y").features.tolist() == [[1], [3]]
    (tmp_path / "3.csv").write_text("b,y\n3,5\n")
    with pytest.raises(ValueError, match="must name files with the same columns"):
        read_table(str(tmp_path / "*.csv"), "y")


def test_what_makes_a_task_too_easy_or_no_regression_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "a,b,c,y,k\n" + "".join(f"{i},{i},{i / 7},{i / 7},3\n" for i in range(20))
    read(tmp_path, text, exclude=["k"])
    read(tmp_path, text, "k")
    read(tmp_path, "a,y\n" + "".join(f"{i},{i % 3}\n" for i in range(20)))
    assert caplog.messages == [
        "t: c is a copy of the target y. To leave it out: data.exclude=[c].",
        "t: the columns a and b are identical.",
        "t: the target k is 3 in every row: there is nothing to learn.",
        "t: the columns a and b are identical.",
        "t: the columns c and y are identical.",
        f"t: the target y takes only 3 values, whole numbers. If they are classes: {CLASSES}",
    ]


def test_a_column_of_identifiers_is_a_feature_that_is_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "Id,rooms,paid,y\n" + "".join(f"{i},{i % 7},{i * 3},{i / 7}\n" for i in range(20))
    assert read(tmp_path, text).feature_names == ("Id", "rooms", "paid")
    (line,) = caplog.messages
    assert line.startswith("t: different whole numbers in every row: Id.")
    assert line.endswith("leave it out: data.exclude=[Id].")
    caplog.clear()
    read(tmp_path, text, exclude=["Id"])
    read(tmp_path, text, features=["Id", "rooms"])
    read(tmp_path, text.replace("Id", "year"))
    assert caplog.messages == []


def test_a_negative_weight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 2 \(line 3\) must have a weight of at least 0, got -1"):
        read(tmp_path, "a,y,w\n1,2,1\n3,4,-1\n", weight="w")


def test_columns_that_are_mostly_missing_are_left_out_before_their_rows_are(tmp_path: Path) -> None:
    table = read(tmp_path, "a,b,y\n" + "".join(f"{i},{i if i % 3 == 0 else ''},{i % 4}\n" for i in range(30)))
    assert table.feature_names == ("a",)
    assert len(table) == 30
    assert table.notes == ("without b: mostly missing",)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_the_first_rows_do_not_show_is_found_in_the_others(tmp_path: Path, suffix: str) -> None:
    num_rows, path = 30_000, str(tmp_path / f"t.{suffix}")
    columns = {name: [f"{row}" for row in range(num_rows)] for name in ("a", "b", "y")}

    def read_it(**settings: object) -> Table:
        if suffix == "csv":
            lines = [",".join(columns), *map(",".join, zip(*columns.values(), strict=True))]
            Path(path).write_text("\n".join(lines))
        else:
            numbers = {name: [float(cell or "nan") for cell in cells] for name, cells in columns.items()}
            parquet.write_table(pa.table(numbers), path)
        table = read_table(path, "y", **settings)
        assert isinstance(table, Table)
        return table

    assert read_it().features.tolist() == [[row, row] for row in range(num_rows)]
    columns["b"][10_000:] = [""] * 20_000
    assert read_it().notes == ("without b: mostly missing",)
    columns["b"] = [*columns["a"][:-1], ""]
    assert read_it().notes == ("1 row with missing cells left out",)
    with pytest.raises(ValueError, match=r"row 30000.*, column 'b' must be a finite number, got none: 1 of 30,000"):
        read_it(missing="refuse")
    columns["b"][-2] = "inf"
    with pytest.raises(ValueError, match=r"row 29999.*, column 'b' must be a finite number, got '?inf"):
        read_it()
