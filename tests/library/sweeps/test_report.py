import subprocess
import sys
from pathlib import Path

import pytest

from downslope.sweeps.report import MOST_ROWS, make_report, print_report
from tests.library.sweeps.conftest import MakeJob


def test_the_report_leaves_its_three_files_and_nothing_else(four_jobs: Path) -> None:
    before = {file.name for file in four_jobs.iterdir()}
    report = make_report(four_jobs)
    assert {file.name for file in four_jobs.iterdir()} - before == {"sweep.csv", "learning_rate.png", "report.html"}
    contents = [report.table.read_bytes(), report.page.read_bytes()]
    assert [make_report(four_jobs).table.read_bytes(), report.page.read_bytes()] == contents


def test_the_terminal_shows_the_jobs_best_first_and_the_files(
    four_jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(make_report(four_jobs))
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:4] == ["lr", "device", "status", "verdict"]
    assert [row[:3] for row in rows[:4]] == [
        ["0.2", "cpu", "completed"],
        ["0.1", "cpu", "completed"],
        ["0.4", "cpu", "diverged"],
        ["0.1", "gpu", "failed"],
    ]
    assert [row[0] for row in rows[4:]] == ["table", "picture", "page"]


def test_the_terminal_is_not_flooded_and_takes_nothing_for_markup(
    make_job: MakeJob, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(MOST_ROWS + 5):
        make_job(f"lr={index + 1}", "data.path=[red]", lr=index + 1, status="completed", loss=index + 1)
    make_job("lr=99", "data.path=[/red]", status="failed", error={"type": "E", "message": "[/b]"})
    print_report(make_report(sweep))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + MOST_ROWS + 1 + 3
    assert "[red]" in lines[1]
    assert "… and 6 more" in lines


def test_a_report_needs_no_torch(four_jobs: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from downslope.sweeps.report import make_report, print_report;"
        f"print_report(make_report(Path({str(four_jobs)!r}))); assert not {{'torch', 'lightning'}} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
