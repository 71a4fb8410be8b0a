import csv
import json
import math
import shlex
from pathlib import Path

import pytest
import yaml

from downslope.sweeps.table import Job, read_curves, read_jobs, rows, varied_keys, write_table
from tests.conftest import scalars
from tests.library.sweeps.conftest import MakeJob, write_curves

TAGS = frozenset({"val/loss", "train/loss"})
CURVES = {"val/loss": {1: 0.75, 2: 0.5}, "train/loss": {3: float("inf")}, "other": {1: 1.0}}


def test_the_least_validation_loss_stands_first_and_what_has_none_last(four_jobs: Path) -> None:
    jobs = read_jobs(four_jobs)
    assert [job.status for job in jobs] == ["completed", "completed", "diverged", "failed"]
    assert [job.objective for job in jobs] == [0.4, 0.5, math.inf, math.inf]
    assert [job.best_objective for job in jobs[:2]] == [pytest.approx(0.3), pytest.approx(0.3)]
    assert jobs[3].error == "ValueError: no <gpu> & such"
    assert varied_keys(jobs) == ["lr", "device"]


def test_the_table_has_a_row_a_job_and_every_digit(four_jobs: Path, make_job: MakeJob, tmp_path: Path) -> None:
    make_job("lr=0.3", 'data.path="a,b\n.csv"', status="completed", loss=0.1 + 0.2)
    write_table(read_jobs(four_jobs), tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 5
    assert float(rows[0]["val/loss"]) == 0.1 + 0.2
    assert rows[0]["data.path"] == '"a,b\n.csv"'
    assert [each["device"] for each in rows[1:]] == ["cpu", "cpu", "cpu", "gpu"]
    assert rows[4]["error"] == "ValueError: no <gpu> & such"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00",
        '{"status": "completed", "unheard": 1}',
        '{"status": ["completed"]}',
        '{"status": "won"}',
        '{"status": "completed", "metrics": {"val/loss": "0.1"}}',
        '{"status": "completed", "metrics": 3}',
        '{"status": "completed", "learning_rate": "fast"}',
        '{"status": "failed", "error": "why"}',
    ],
)
def test_a_result_that_cannot_be_read_is_a_failed_job_and_the_others_stay(
    four_jobs: Path, make_job: MakeJob, content: str
) -> None:
    (make_job("lr=0.3") / "result.json").write_text(content)
    jobs = read_jobs(four_jobs)
    assert len(jobs) == 5
    (broken,) = (job for job in jobs if job.problem)
    assert broken.status == "failed"
    assert broken.error.startswith("Cannot read its files: ")
    assert rows([broken], [])[0]["error"] == broken.error


def test_metrics_that_are_not_finite_are_nothing_in_the_table(make_job: MakeJob, sweep: Path) -> None:
    folder = make_job("lr=0.1", status="completed", loss=math.nan)
    assert json.loads((folder / "result.json").read_text())["metrics"]["val/loss"] is None
    (job,) = read_jobs(sweep)
    assert job.objective == math.inf
    assert rows([job], [])[0]["val/loss"] is None


def test_a_job_that_was_killed_or_never_started_is_there_as_not_run(make_job: MakeJob, sweep: Path) -> None:
    make_job("lr=0.1", "seed=2", status="completed", loss=0.5)
    make_job("lr=0.2", "seed=2", lr=0.2)  # killed before its result
    sweeper = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": {"seed": "2,3"}}
    overrides = {"task": ["lr=0.1,0.2"]}
    (sweep / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"sweeper": sweeper, "overrides": overrides}}))
    jobs = read_jobs(sweep)
    assert [(job.status, job.overrides["lr"], job.overrides["seed"]) for job in jobs] == [
        ("completed", "0.1", "2"),
        ("not run", "0.1", "3"),
        ("not run", "0.2", "2"),
        ("not run", "0.2", "3"),
    ]
    assert [job.learning_rate for job in jobs] == [0.1, 0.1, 0.2, 0.2]
    assert all(job.curves == {} and job.best_objective is None for job in jobs[1:])


@pytest.mark.parametrize("value", ["'it''s'", '"two words"', "$(touch owned)", "a=b", "[1,2]", "`x`;y", "größer"])
def test_the_command_that_runs_it_again_survives_a_shell(value: str, tmp_path: Path) -> None:
    job = Job("job", tmp_path, {"data.path": value, "~scheduler": ""})
    assert shlex.split(job.command) == ["python", "scripts/train.py", f"data.path={value}", "~scheduler"]


def test_what_is_no_sweep_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        read_jobs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no job in it"):
        read_jobs(tmp_path)


def test_the_curves_are_those_that_tensorboards_own_reader_finds(tmp_path: Path) -> None:
    write_curves(tmp_path, CURVES)
    curves = read_curves(tmp_path, TAGS)
    assert set(curves) == TAGS
    for tag, curve in curves.items():
        assert list(curve.items()) == scalars(tmp_path, tag)


def test_a_step_written_again_after_a_resume_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for second, value in enumerate((0.75, 0.25)):
        monkeypatch.setattr("time.time", lambda now=1_700_000_000 + second: now)  # an event file is named by it
        write_curves(tmp_path, {"val/loss": {2: value, 3 + second: 1.0}})
    assert read_curves(tmp_path, TAGS) == {"val/loss": {2: 0.25, 3: 1.0, 4: 1.0}}


def test_a_run_without_an_event_file_has_no_curve(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "nowhere", TAGS) == {}
