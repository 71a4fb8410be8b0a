"""A sweep as a table: a row a job, whatever became of it."""

import csv
import functools
import io
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from downslope.runs.result import EXIT_CODES, FILE_NAME, Result, read_result
from downslope.runs.whole_files import whole_file
from downslope.sweeps.curves import Curve, read_curves

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there
LOSSES = ("val/loss", "train/loss")
GRADIENT_NORMS = ("gradient_norm/total", "gradient_norm/applied")


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        name: Its folder, as seen from the sweep's.
        folder: Where it ran, or would have.
        overrides: What distinguishes it, value by key, as typed.
        result: What it left behind; None where it has not ended, or has never run.
        default_learning_rate: What its configuration says, for a job without a result.
        problem: Why its files cannot be read.
    """

    name: str
    folder: Path
    overrides: Mapping[str, str]
    result: Result | None = None
    default_learning_rate: float | None = None
    problem: str | None = None

    @property
    def status(self) -> str:
        """How it ended; `not run` without a result, `failed` if that cannot be read."""
        if self.problem:
            return "failed"
        return self.result.status if self.result else "not run"

    @property
    def learning_rate(self) -> float | None:
        """The rate it began with, or would have."""
        return (self.result and self.result.learning_rate) or self.default_learning_rate

    @property
    def limit(self) -> float | None:
        """2/λ, the largest stable rate for plain gradient descent."""
        return self.result.largest_stable_learning_rate if self.result else None

    @property
    def objective(self) -> float:
        """Validation loss of the last weights, infinity where there is none: what the table is sorted by."""
        loss = self.result.metrics.get("val/loss") if self.result and self.status == "completed" else None
        return loss if isinstance(loss, int | float) and math.isfinite(loss) else math.inf

    @property
    def error(self) -> str:
        """Why it failed, in a line; empty if it did not."""
        if self.problem or not (self.result and self.result.error):
            return self.problem or ""
        return f"{self.result.error.get('type', 'Error')}: {self.result.error.get('message', '')}"

    @property
    def command(self) -> str:
        """Runs it once more, alone."""
        overrides = [f"{key}={value}" if value else key for key, value in self.overrides.items()]
        return shlex.join(["python", "scripts/train.py", *overrides])

    @functools.cached_property
    def curves(self) -> Mapping[str, Curve]:
        """Losses and gradient norms by step."""
        return read_curves(self.folder, frozenset(LOSSES + GRADIENT_NORMS))

    @property
    def best_loss(self) -> float | None:
        """The least validation loss on its way."""
        losses = [loss for loss in self.curves.get("val/loss", {}).values() if math.isfinite(loss)]
        losses += [self.objective] if math.isfinite(self.objective) else []
        return min(losses, default=None)


def read_jobs(sweep: Path) -> list[Job]:
    """Returns the sweep's jobs, the least validation loss first, those without one by name.

    Raises:
        ValueError: It is not a sweep's folder.
    """
    if not sweep.is_dir():
        raise ValueError(
            f"A sweep's folder must be given, such as outputs/sweeps/…, got {str(sweep)!r}: no such folder."
        )
    folders = [Path(path) for path, names, files in os.walk(sweep) if ".hydra" in names or FILE_NAME in files]
    jobs = [_read_job(sweep, folder) for folder in folders if folder != sweep]
    jobs += _never_started(sweep, jobs)
    if not jobs:
        raise ValueError(f"A sweep's folder must hold a folder for each job, got {str(sweep)!r}: no job in it.")
    return sorted(jobs, key=lambda job: (job.objective, job.status, job.learning_rate or 0.0, job.name))


def _read_job(sweep: Path, folder: Path) -> Job:
    job = Job(name=str(folder.relative_to(sweep)), folder=folder, overrides={})
    try:
        result = _checked(read_result(folder))
        typed = _read_yaml(folder / ".hydra" / "overrides.yaml") or (result.overrides if result else [])
        rate = (_read_yaml(folder / ".hydra" / "config.yaml") or {}).get("lr")
        rate = float(rate) if isinstance(rate, int | float) else None
        return replace(job, overrides=by_key(typed), result=result, default_learning_rate=rate)
    except (AttributeError, OSError, TypeError, ValueError, json.JSONDecodeError, yaml.YAMLError) as error:
        return replace(job, problem=f"Cannot read its files: {type(error).__name__}: {error}")


def _checked(result: Result | None) -> Result | None:
    """Raises for what no run writes, so that one file that somebody edited does not cost the whole report."""
    if result:
        figures = (
            result.learning_rate, result.largest_stable_learning_rate, result.suggested_learning_rate,
            result.excess_loss, result.num_optimizer_steps, result.seconds, *result.metrics.values(),
        )  # fmt: skip
        if result.status not in EXIT_CODES or not all(isinstance(each, int | float | None) for each in figures):
            raise ValueError(f"{FILE_NAME} has a status that is none, or a figure that is not a number")
        if not isinstance(result.error, dict | None):
            raise ValueError(f"the error in {FILE_NAME} has no type and message")
    return result


def _read_yaml(file: Path) -> Any:
    return yaml.load(file.read_text(), Loader=LOADER) if file.is_file() else None


def by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Splits overrides into key and value.

    Example:
        >>> by_key(["lr=0.1", "data.path='a=b.csv'", "~scheduler"])
        {'lr': '0.1', 'data.path': "'a=b.csv'", '~scheduler': ''}
    """
    pairs = (str(override).partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def _never_started(sweep: Path, started: Sequence[Job]) -> list[Job]:
    """The jobs that Hydra's `multirun.yaml` announces and that have no folder: a sweep was killed before them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    hydra = ((_read_yaml(sweep / "multirun.yaml") or {}).get("hydra")) or {}
    sweeper = hydra.get("sweeper") or {}
    if not str(sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return []  # another sweeper decides as it goes
    typed = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    typed += (hydra.get("overrides") or {}).get("task") or []
    try:
        batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(typed), None)
    except HydraException:  # an interval has no list of values
        return []
    known = {frozenset(job.overrides.items()) for job in started}
    planned = [by_key(overrides) for batch in batches for overrides in batch]
    return [
        Job(
            name=",".join(f"{key}={value}" for key, value in overrides.items()),
            folder=sweep / "-",
            overrides=overrides,
            default_learning_rate=_number(overrides.get("lr", "")),
        )
        for overrides in planned
        if frozenset(overrides.items()) not in known
    ]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """Returns the overrides that are not the same in all jobs, the learning rate first."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    varied = [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]
    return sorted(varied, key=lambda key: key != "lr")


def row(job: Job, keys: Sequence[str]) -> dict[str, Any]:
    """Returns what the table says of a job, by column; None where there is nothing to say."""
    result = job.result or Result(status="failed")
    return {
        "job": job.name,
        **{key: job.overrides.get(key) for key in keys},
        "status": job.status,
        "verdict": result.verdict,
        **{name: result.metrics.get(name) for name in ("val/loss", "train/loss", "test/loss")},
        "best val/loss": job.best_loss,
        "excess_loss": result.excess_loss,
        "learning_rate": job.learning_rate,
        "2/λ": job.limit,
        "steps": result.num_optimizer_steps if job.result else None,
        "seconds": round(result.seconds, 3) if job.result else None,
        "ran on": result.device,
        "error": job.error or None,
    }


def write_table(jobs: Sequence[Job], file: Path) -> None:
    """Writes `sweep.csv`: a column an override, figures to the last digit, in the order of `read_jobs`."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    rows = [row(job, keys) for job in jobs]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(file) as stream:
        stream.write(table.getvalue().encode())
