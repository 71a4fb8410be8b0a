"""The laboratory's look at many tables, on a few that are written as R writes them."""

from pathlib import Path

import pytest
import tables
from _pytest.capture import CaptureFixture

HEAD = '"","speed","kind","made","dist"\n'


def rows(num_rows: int, missing: int = 10**9) -> str:
    lines = (
        f'"{i}",{i % 7},"{"ab"[i % 2]}",{"TRUE" if i % 3 else "FALSE"},{"NA" if i % missing == 1 else i * 1.5}\n'
        for i in range(1, num_rows + 1)
    )
    return HEAD + "".join(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "cars": rows(30),
        "gaps": rows(30, missing=7),
        "series": '"","time","x"\n' + "".join(f'"{i}",{1900 + i},{i * i}\n' for i in range(20)),
        "alone": '"","x"\n' + "".join(f'"{i}",{i * i}\n' for i in range(20)),
        "same": '"","a","b","y"\n' + "".join(f'"{i}",{i % 5},{2 * (i % 5)},{i % 3}\n' for i in range(25)),
        "words": '"","word"\n"1","a"\n"2","b"\n',
        "short": rows(3),
    }
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text)
    return tmp_path


def test_tables_train_and_predict_back_or_are_refused_for_a_reason(folder: Path) -> None:
    verdicts = {file.stem: tables.judged(file) for file in folder.glob("*.csv")}
    trained = {name for name, verdict in verdicts.items() if verdict == "trained"}
    assert trained == {"cars", "gaps", "series", "alone", "same"}, verdicts
    assert verdicts["words"] == "refused: no numeric column"
    assert "short must leave 2 rows to train on" in verdicts["short"]


def test_a_wrong_number_and_a_wrong_optimum_are_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: CaptureFixture[str]
) -> None:
    read = tables.numeric_columns
    monkeypatch.setattr(tables, "numeric_columns", lambda file: {**read(file), "speed": [9.0] * 30})
    assert tables.judged(folder / "cars.csv") == "wrong: the numbers of speed"
    monkeypatch.undo()
    monkeypatch.setattr(tables.np.linalg, "lstsq", lambda system, _, **__: [0 * system[0]])
    assert tables.judged(folder / "cars.csv").startswith("wrong: least squares")
