"""A sweep as a table: a row a job, whatever became of it."""

import csv
import io
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event

from downslope.logs.event_files import EVENT_FILES, records
from downslope.runs.command_line import COMMAND
from downslope.runs.console import explain, one_line
from downslope.runs.plain_files import csv_cell, finite, printable, read_bytes, read_yaml
from downslope.runs.result import FILE_NAME, Result, objective_of, read_result
from downslope.sweeps.grid import announced_jobs

Curve = dict[int, float]
GRADIENT_NORM = "gradient_norm/total"
PARTS = ("val", "train", "test")  # the order of their metrics
OPTIONAL = ("excess_loss", "2/λ")  # columns that only a task with a closed form has
FALLBACK = ("python", "scripts/train.py")
SAME = 0.05  # rates whose logarithms differ by less are one
MOST_EVENT_BYTES = 2**28
MOST_COLUMNS = 200  # of metrics, and of overrides: a folder of evil jobs could announce millions


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        name: Its folder, as seen from the sweep's.
        folder: Where it ran, or would have.
        overrides: What distinguishes it, value by key, as typed.
        result: What it left behind; None where it has not ended, or has never run.
        default_learning_rate: What its configuration says, for a job without a result.
        problem: Why some of its files cannot be read.
        curves: The objective, the same of the training rows, and the gradient's norm, by step.
        started_by: The sweep's command, less its overrides.
    """

    name: str
    folder: Path
    overrides: Mapping[str, str]
    result: Result | None = None
    default_learning_rate: float | None = None
    problem: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    started_by: Sequence[str] = FALLBACK

    @property
    def status(self) -> str:
        """How it ended; without a result `not run`, or `failed` if that cannot be read."""
        return self.result.status if self.result else "failed" if self.problem else "not run"

    @property
    def learning_rate(self) -> float | None:
        """The rate it began with, or would have."""
        return (self.result and self.result.learning_rate) or self.default_learning_rate

    @property
    def limit(self) -> float | None:
        """2/λ, the largest stable rate for plain gradient descent."""
        return self.result.largest_stable_learning_rate if self.result else None

    @property
    def critical(self) -> float | None:
        """The least η_c that was seen: above it a step goes uphill."""
        return self.result.critical_learning_rate if self.result else None

    @property
    def objective(self) -> float:
        """Of the last weights, what the table is sorted by; infinity on the bad side where there is none."""
        return objective_of(self.result, self.result.mode if self.result else "min")

    @property
    def best_objective(self) -> float | None:
        """The best value on its way."""
        if not (self.result and self.result.monitor):
            return None
        seen = [*self.curves.get(self.result.monitor, {}).values(), self.objective]
        best = max if self.result.mode == "max" else min
        return best((value for value in seen if math.isfinite(value)), default=None)

    @property
    def error(self) -> str:
        """Why it failed, or cannot be read, in a line; empty if neither."""
        error = self.result and self.result.error
        failed = f"{error.get('type', 'Error')}: {error.get('message', '')}" if error else ""
        return " · ".join(filter(None, (failed, self.problem)))

    @property
    def command(self) -> str:
        """Runs it once more, alone, where the sweep's command was given."""
        overrides = [f"{key}={value}" if value else key for key, value in self.overrides.items()]
        return shlex.join([*self.started_by, *overrides])


def next_rate(jobs: Sequence[Job]) -> float | None:
    """Returns the rate that the best job suggests, unless one that did worse is as large, or lies on the way there."""
    best = jobs[0]
    rate = best.result.suggested_learning_rate if best.result else None
    if not rate or not best.learning_rate or min(rate, best.learning_rate) <= 0:  # a folder may say anything
        return None if rate is None or rate <= 0 else rate
    others = [job.learning_rate for job in jobs[1:] if job.result and _but_for_the_rate(job) == _but_for_the_rate(best)]
    begin = math.log(best.learning_rate)
    way = math.log(rate) - begin
    gone = [(math.log(tried) - begin) / way for tried in others if tried and tried > 0 and way]
    return None if any(0 < share < 1 + SAME / abs(way) for share in gone) else rate


def _but_for_the_rate(job: Job) -> dict[str, str]:
    return {key: value for key, value in job.overrides.items() if key != "lr"}


def read_jobs(sweep: Path) -> list[Job]:
    """Returns the sweep's jobs, the best objective first, those without one by name, those not run last.

    What cannot be read of a job is its `problem`; everything else is there.

    Raises:
        ValueError: It is not a sweep's folder.
    """
    if not sweep.is_dir():
        raise ValueError(
            f"A sweep's folder must be given, such as outputs/sweeps/…, got {str(sweep)!r}: no such folder."
        )
    jobs = [_read_job(sweep, folder) for folder in _folders(sweep)]
    announced, problem = _attempt(lambda: printable(read_yaml(sweep / "multirun.yaml")))
    if problem:
        jobs.append(Job("multirun.yaml", sweep / "-", {}, problem=problem))
    jobs += _never_started(sweep, announced, jobs)
    if not jobs:
        raise ValueError(f"A sweep's folder must hold a folder for each job, got {str(sweep)!r}: no job in it.")
    monitor, mode = judged_by(jobs)
    command, _ = _attempt(lambda: shlex.split(_at(announced, "hydra", "job", "env_set", COMMAND) or ""))
    for job in jobs:
        job.started_by = command or FALLBACK
        if not job.folder.is_symlink():
            curves, problem = _attempt(read_curves, job.folder, {*curve_tags(monitor), GRADIENT_NORM})
            job.curves, job.problem = curves or {}, job.problem or problem

    def rank(job: Job) -> Any:
        good = job.objective if mode == "min" else -job.objective
        return (good if math.isfinite(good) else math.inf, job.status, job.learning_rate or 0.0, job.name)

    return sorted(jobs, key=rank)


def _folders(sweep: Path) -> list[Path]:
    """Every job's folder, and every link in the place of one."""
    found = []
    for path, names, files in os.walk(sweep):
        folder = Path(path)
        if folder != sweep and (".hydra" in names or FILE_NAME in files):
            found.append(folder)
            names.clear()
        found += [folder / name for name in names if (folder / name).is_symlink()]
        names[:] = [name for name in names if not name.startswith(".")]
    return found


def _attempt(read: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What can be read, or why it cannot."""
    try:
        return read(*arguments), ""
    except Exception as error:  # whatever a stranger has thought of
        return None, one_line(f"Cannot read its files: {explain(error)}")


def _read_job(sweep: Path, folder: Path) -> Job:
    name = printable(str(folder.relative_to(sweep)))
    if folder.is_symlink():
        return Job(name, folder, {}, problem="Cannot read its files: the folder is a link.")
    result, problem = _attempt(read_result, folder)
    typed, other = _attempt(lambda: printable(read_yaml(folder / ".hydra" / "overrides.yaml")))
    if not (isinstance(typed, list) and all(isinstance(each, str) for each in typed)):
        typed = result.overrides if result else []
    config, _ = (None, "") if result else _attempt(read_yaml, folder / ".hydra" / "config.yaml")
    return Job(name, folder, by_key(typed), result, finite(_at(config, "lr")), problem or other)


def read_curves(run: Path, tags: set[str]) -> Mapping[str, Curve]:
    """Returns value by step for each tag that the run has.

    Args:
        run: The run's folder.
        tags: Which scalars; of a step written twice the later one counts.

    Raises:
        ValueError: An event file is no regular file.
        DecodeError: It holds a record that is none.
    """
    curves: dict[str, Curve] = {}
    for file in sorted(run.glob(EVENT_FILES)):
        for record in records(read_bytes(file, MOST_EVENT_BYTES) or b""):
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.tag in tags and value.HasField("simple_value"):
                    curves.setdefault(value.tag, {})[event.step] = value.simple_value
    return curves


def _never_started(sweep: Path, announced: Any, started: Sequence[Job]) -> list[Job]:
    """The jobs that Hydra's `multirun.yaml` announces and that have no folder: a sweep was killed before them."""
    hydra = _at(announced, "hydra")
    planned, _ = _attempt(lambda: announced_jobs(_at(hydra, "sweeper") or {}, _at(hydra, "overrides", "task") or []))
    known = {frozenset(job.overrides.items()) for job in started}
    named = ((",".join(job), by_key(job)) for job in planned or ())
    return [
        Job(name, sweep / "-", overrides, None, finite(overrides.get("lr")))
        for name, overrides in named
        if frozenset(overrides.items()) not in known
    ]


def by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Splits overrides into key and value.

    Example:
        >>> by_key(["lr=0.1", "data.path='a=b.csv'", "~scheduler"])
        {'lr': '0.1', 'data.path': "'a=b.csv'", '~scheduler': ''}
    """
    pairs = (override.partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def _at(values: Any, *keys: str) -> Any:
    """What stands at a place in a file of whatever shape, None where nothing does."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def judged_by(jobs: Sequence[Job]) -> tuple[str, str]:
    """Returns monitor and mode of the sweep, as the first job that has them says."""
    said = ((job.result.monitor, job.result.mode) for job in jobs if job.result and job.result.monitor)
    return next(said, ("val/loss", "min"))


def curve_tags(monitor: str) -> tuple[str, ...]:
    """Returns the objective's tag, and that of the same metric over the training rows.

    Example:
        >>> curve_tags("val/accuracy")
        ('val/accuracy', 'train/accuracy')
    """
    return tuple(dict.fromkeys((monitor, monitor.replace("val", "train", 1))))


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """Returns the overrides that are not the same in all jobs, the learning rate first."""
    varied = [key for key in _keys(jobs) if len({job.overrides.get(key) for job in jobs}) > 1]
    return sorted(varied, key=lambda key: key != "lr")


def _keys(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(key for job in jobs for key in job.overrides))[:MOST_COLUMNS]


def _metrics(jobs: Sequence[Job], monitor: str) -> list[str]:
    """The tag of every metric that any job logged: the objective, then those of validation, training and test."""

    def rank(tag: str) -> Any:
        part = tag.partition("/")[0]
        return (tag != monitor, PARTS.index(part) if part in PARTS else len(PARTS), tag)

    tags = {monitor, *(tag for job in jobs if job.result for tag in job.result.metrics)}
    return sorted(tags, key=rank)[:MOST_COLUMNS]


def rows(jobs: Sequence[Job], keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns what the table says of each job, by column; None where there is nothing to say.

    Args:
        jobs: In the order of the rows.
        keys: Which overrides have a column; all of them if None.
    """
    monitor, _ = judged_by(jobs)
    metrics = _metrics(jobs, monitor)
    shown = _keys(jobs) if keys is None else keys
    table = [_row(job, shown, metrics, monitor) for job in jobs]
    absent = [name for name in OPTIONAL if all(row[name] is None for row in table)]
    return [{name: value for name, value in row.items() if name not in absent} for row in table]


def _row(job: Job, keys: Sequence[str], metrics: Sequence[str], monitor: str) -> dict[str, Any]:
    result = job.result or Result(status="failed")
    logged = {monitor: result.objective, **result.metrics}
    return {
        "job": job.name,
        **{key: job.overrides.get(key) for key in keys},
        "status": job.status,
        "verdict": result.verdict,
        **{tag: logged.get(tag) for tag in metrics},
        f"best {monitor}": job.best_objective,
        "excess_loss": result.excess_loss,
        "learning_rate": job.learning_rate,
        "2/λ": job.limit,
        "steps": result.num_optimizer_steps if job.result else None,
        "seconds": round(result.seconds, 3) if job.result else None,
        "ran on": result.device,
        "error": job.error or None,
    }


def csv_of(jobs: Sequence[Job]) -> str:
    """Returns the table as CSV: a column an override, figures to the last digit."""
    table = io.StringIO(newline="")
    lines = rows(jobs)
    for line in (lines[0], *(line.values() for line in lines)):
        csv.writer(table).writerow(map(csv_cell, line))
    return table.getvalue()
