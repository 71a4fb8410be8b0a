"""A sweep's report: the table, the picture, the page, and a summary in the terminal."""

import base64
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from downslope.pictures.style import png
from downslope.runs.console import one_line
from downslope.runs.whole_files import whole_file
from downslope.sweeps.comparison import as_good, over_seeds, rows_over_seeds
from downslope.sweeps.picture import MOST_CURVES, draw_curves, draw_learning_rate
from downslope.sweeps.table import Job, csv_of, judged_by, next_rate, read_jobs, rows, varied_keys

MOST_ROWS = 30  # in the terminal
MOST_COLUMNS, MOST_ERRORS = 60, 5  # of the page
LONG = ("job", "error")
EXTREMES = {"min": "lowest", "max": "highest"}


@dataclass(frozen=True)
class Report:
    """What was made of the jobs, the best objective first: `sweep.csv`, `learning_rate.png` and `report.html`."""

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
    picture, curves = png(draw_learning_rate(jobs)), draw_curves(jobs)
    page = _page(sweep.resolve().name, jobs, picture, png(curves) if curves else None)
    report = Report(jobs, sweep / "sweep.csv", sweep / "learning_rate.png", sweep / "report.html")
    files = {
        report.table: csv_of(jobs).encode(),
        report.picture: picture,
        report.page: page.encode(errors="replace"),
    }
    for file, content in files.items():
        with whole_file(file) as stream:
            stream.write(content)
    return report


def print_report(report: Report) -> None:
    """Prints the jobs, the best objective first, and where to look."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no edge
    all_rows = rows(report.jobs, varied_keys(report.jobs))
    over = rows_over_seeds(over_seeds(report.jobs), judged_by(report.jobs)[0])
    for lines, names in ((all_rows, _columns(report.jobs, all_rows)), (over, list(over[0]) if over else [])):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in names:
            is_number = all(isinstance(line[name], int | float | None) for line in lines)
            table.add_column(Text(one_line(name)), justify="right" if is_number else "left", overflow="fold")
        for line in lines[:MOST_ROWS]:
            table.add_row(*(Text(one_line(_text(line[name]))) for name in names))
        if lines:
            console.print(table)
        if len(lines) > MOST_ROWS:
            console.print(f"… and {len(lines) - MOST_ROWS} more")
    for name, file in (("table", report.table), ("picture", report.picture), ("page", report.page)):
        typed = os.path.relpath(file) if file.is_relative_to(Path.cwd()) else file
        console.print(Text(f"  {name:<10}{one_line(str(typed))}"), soft_wrap=True)


def _columns(jobs: Sequence[Job], table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is looked at first: what was varied, how it ended, and the figures that any job has."""
    keys, (monitor, _) = varied_keys(jobs), judged_by(jobs)
    figures = ["verdict", monitor, f"best {monitor}", "excess_loss", "2/λ", "steps", "seconds"]
    shown = [name for name in figures if any(row.get(name) is not None for row in table)]
    return [*(keys or ["job"]), "status", *shown]


def _page(title: str, jobs: Sequence[Job], picture: bytes, curves: bytes | None) -> str:
    """A page that opens from disk: the pictures, a row a job and the command that runs it."""
    from jinja2 import Environment, PackageLoader

    monitor, mode = judged_by(jobs)
    keys = varied_keys(jobs)
    table = rows(jobs, keys)
    first = _columns(jobs, table)
    left_out = {*first, *LONG, "learning_rate" if "lr" in first else ""}
    others = [*(name for name in table[0] if name not in left_out), *(name for name in LONG if name not in first)]
    columns = [*first, *(name for name in others if any(row[name] for row in table))][:MOST_COLUMNS]
    varies = [name for name in columns if name == monitor or len({str(row[name]) for row in table}) > 1]
    same = {key: value for key, value in islice(jobs[0].overrides.items(), MOST_COLUMNS) if key not in keys}
    if len(jobs) > 1:
        same |= {name: _text(table[0][name]) for name in columns if name not in varies}
        columns = varies
    best = [f"{key}={jobs[0].overrides[key]}" for key in keys if key in jobs[0].overrides]
    over = rows_over_seeds(over_seeds(jobs), monitor)
    page = Environment(loader=PackageLoader("downslope.sweeps", "."), autoescape=True).get_template("page.html")
    return page.render(
        title=title,
        jobs=jobs,
        counts=Counter(job.status for job in jobs),
        errors=Counter(job.error for job in jobs if job.error).most_common(MOST_ERRORS),
        best=jobs[0] if math.isfinite(jobs[0].objective) else None,
        best_name=", ".join(best) or jobs[0].name,
        same=same,
        num_as_good=len(as_good(jobs)),
        extreme=EXTREMES.get(mode),
        monitor=monitor,
        suggested=next_rate(jobs),
        picture=_data_uri(picture),
        curves=curves and _data_uri(curves),
        most_curves=MOST_CURVES,
        num_curves=sum(any(job.curves.values()) for job in jobs),
        num_first=columns.index(f"best {monitor}") + 1 if f"best {monitor}" in columns else len(columns),
        columns=columns,
        over_seeds=[list(over[0]), *([_text(value) for value in row.values()] for row in over)] if over else [],
        rows=[(job, [_cell(name, row[name]) for name in columns]) for job, row in zip(jobs, table, strict=True)],
    )


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(name: str, value: Any) -> tuple[Any, str, str]:
    """What a cell sorts by, what it shows, and its kind."""
    try:
        return float(value), _text(value), "number"
    except (OverflowError, TypeError, ValueError):
        text = _text(value)
        return text, text, "words" if name in LONG else text if name == "status" else ""
