import re
import subprocess
import sys
from html.parser import HTMLParser
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


VOID = {"meta", "link", "source", "img", "br"}


class Page(HTMLParser):
    """The cells of the table, and every element and address; the elements must close."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.html = file.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data


def test_the_page_holds_everything_itself(four_jobs: Path) -> None:
    page = Page(make_report(four_jobs).page)
    assert len(page.addresses) == 3  # the icon and two pictures
    assert all(address.startswith("data:") for address in page.addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page.html)
    assert "4 jobs" in page.html
    assert "<b>lr=0.15</b>" in page.html


def test_a_row_says_what_came_of_the_job_and_how_to_run_it_again(four_jobs: Path) -> None:
    head, *rows = Page(make_report(four_jobs).page).rows
    jobs = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(job["lr"], job["device"], job["status"]) for job in jobs] == [
        ("0.2", "cpu", "completed"),
        ("0.1", "cpu", "completed"),
        ("0.4", "cpu", "diverged"),
        ("0.1", "gpu", "failed"),
    ]
    assert jobs[0]["val/loss"] == "0.4"
    assert jobs[0]["verdict"] == "converged"
    assert jobs[3]["error"] == "ValueError: no <gpu> & such"
    assert jobs[3]["again"] == "python scripts/train.py lr=0.1 device=gpu"


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}"])
def test_nothing_that_people_type_becomes_part_of_the_page(
    four_jobs: Path, make_job: MakeJob, sweep: Path, hostile: str
) -> None:
    make_job(
        f"name={hostile}", f"{hostile}=1", status="failed", error={"type": "E", "message": hostile}, device=hostile
    )
    renamed = sweep.rename(sweep.with_name(f"rates{hostile.replace('/', '')}"))
    page = Page(make_report(renamed).page)
    assert (page.elements.count("script"), page.elements.count("img")) == (1, 2)
    assert sum(hostile in cell for cell in page.rows[-1]) >= 3
    assert "49" not in page.rows[-1]


def test_one_job_and_all_failed_have_a_page(make_job: MakeJob, sweep: Path) -> None:
    make_job("lr=0.1", status="failed", error={"type": "E", "message": "why"})
    page = Page(make_report(sweep).page)
    assert "1 job:" in page.html
    assert page.elements.count("img") == 1
    assert "Least validation loss" not in page.html
