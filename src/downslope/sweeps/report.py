"""A sweep's report: the table, the picture, the page, and a summary in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from downslope.sweeps.page import write_page
from downslope.sweeps.picture import draw_learning_rate, save
from downslope.sweeps.table import Job, read_jobs, row, varied_keys, write_table

MOST_ROWS = 30
COLUMNS = ("status", "verdict", "val/loss", "best val/loss", "excess_loss", "2/λ", "steps", "seconds")


@dataclass(frozen=True)
class Report:
    """What was made.

    Attributes:
        jobs: The least validation loss first.
        table: `sweep.csv`.
        picture: `learning_rate.png`.
        page: `report.html`.
    """

    jobs: Sequence[Job]
    table: Path
    picture: Path
    page: Path


def make_report(sweep: Path) -> Report:
    """Makes a sweep's report out of what its jobs left behind, into the sweep's folder.

    Raises:
        ValueError: The folder holds no job.
    """
    jobs = read_jobs(sweep)
    report = Report(jobs, sweep / "sweep.csv", sweep / "learning_rate.png", sweep / "report.html")
    write_table(jobs, report.table)
    save(draw_learning_rate(jobs), report.picture)
    write_page(jobs, report.page, title=sweep.resolve().name, picture=report.picture)
    return report


def print_report(report: Report) -> None:
    """Prints the jobs, the least validation loss first, and where to look."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no edge
    keys = varied_keys(report.jobs)
    rows = [row(job, keys) for job in report.jobs]
    names = [*keys, *(name for name in COLUMNS if any(cells[name] is not None for cells in rows))] or ["job", "status"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(Text(name), justify="right" if name in COLUMNS[2:] else "left", overflow="fold")
    for cells in rows[:MOST_ROWS]:
        table.add_row(*(Text(_text(cells[name])) for name in names))
    console.print(table)
    if len(rows) > MOST_ROWS:
        console.print(f"… and {len(rows) - MOST_ROWS} more")
    for name, file in (("table", report.table), ("picture", report.picture), ("page", report.page)):
        console.print(Text(f"  {name:<10}{file}"), soft_wrap=True)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
