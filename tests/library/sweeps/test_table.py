import csv
import io
import json
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tensorboard.summary.writer.record_writer import RecordWriter

from downslope.sweeps.grid import MISSING, SWEEPERS
from downslope.sweeps.report import make_report, print_report
from downslope.sweeps.table import Job, csv_of, next_rate, read_curves, read_jobs, rows, varied_keys
from tests.conftest import scalars
from tests.library.sweeps.conftest import MakeJob, write_curves

TAGS = {"val/loss", "train/loss"}
CURVES = {"val/loss": {1: 0.75, 2: 0.5}, "train/loss": {3: float("inf")}, "other": {1: 1.0}}


def test_the_least_validation_loss_stands_first_and_what_has_none_last(four_jobs: Path) -> None:
    jobs = read_jobs(four_jobs)
    assert [job.status for job in jobs] == ["completed", "completed", "diverged", "failed"]
    assert [job.objective for job in jobs] == [0.4, 0.5, math.inf, math.inf]
    assert [job.best_objective for job in jobs[:2]] == [pytest.approx(0.3), pytest.approx(0.3)]
    assert jobs[3].error == "ValueError: no <gpu> & such"
    assert varied_keys(jobs) == ["lr", "device"]


def test_the_table_has_a_row_a_job_and_every_digit(four_jobs: Path, make_job: MakeJob) -> None:
    make_job("lr=0.3", 'data.path="a,b\n.csv"', status="completed", loss=0.1 + 0.2)
    rows = list(csv.DictReader(io.StringIO(csv_of(read_jobs(four_jobs)), newline="")))
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


EVIL: dict[str, Callable[[Path], object]] = {
    "a result nested 100,000 deep": lambda job: (job / "result.json").write_text("[" * 100_000),
    "a loss of 400 digits": lambda job: (job / "result.json").write_text(
        '{"status": "completed", "metrics": {"val/loss": 1' + "0" * 400 + "}}"
    ),
    "no seconds": lambda job: (job / "result.json").write_text('{"status": "completed", "seconds": null}'),
    "a list as verdict": lambda job: (job / "result.json").write_text('{"status": "completed", "verdict": ["a"]}'),
    "a folder as result": lambda job: (job / "result.json").mkdir(),
    "a pipe as result": lambda job: os.mkfifo(job / "result.json"),
    "a link as result": lambda job: (job / "result.json").symlink_to("/etc/passwd"),
    "ten gigabytes as result": lambda job: os.truncate(_touched(job / "result.json"), 10 * 2**30),
    "a bad record as events": lambda job: _write_record(job / "events.out.tfevents.1", b"\x0a\xff\xff\xff\xff\x0f"),
    "a folder as events": lambda job: (job / "events.out.tfevents.1").mkdir(),
    "a dangling link as events": lambda job: (job / "events.out.tfevents.1").symlink_to("nowhere"),
    "a pipe as events": lambda job: os.mkfifo(job / "events.out.tfevents.1"),
    "a tag in its overrides": lambda job: (job / ".hydra/overrides.yaml").write_text("- !!binary aGVsbG8="),
    "overrides that never end": lambda job: (job / ".hydra/overrides.yaml").write_text("&a [*a]"),
    "overrides that are no text": lambda job: (job / ".hydra/overrides.yaml").write_bytes(b"\xff\xfe\x00"),
    "overrides 200,000 deep": lambda job: (job / ".hydra/overrides.yaml").write_text("[" * 200_000),
}


def _touched(file: Path) -> Path:
    file.touch()
    return file


def _write_record(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        RecordWriter(stream).write(data)


def test_a_job_that_cannot_be_read_is_a_row_that_says_so_and_nothing_else_is_lost(
    four_jobs: Path, make_job: MakeJob
) -> None:
    good = rows(read_jobs(four_jobs), ["lr", "device"])
    evil = {make_job("lr=0.3", "device=evil").name: what for what in EVIL}
    for name, what in evil.items():
        for file in (four_jobs / name).glob("events*"):
            file.unlink()
        EVIL[what](four_jobs / name)
    (four_jobs / os.fsdecode(b"caf\xe9") / ".hydra").mkdir(parents=True)
    (four_jobs / "a link").symlink_to(four_jobs)
    report = make_report(four_jobs)
    print_report(report)
    found = {row["job"]: row for row in rows(report.jobs, ["lr", "device"])}
    assert len(found) == 4 + len(EVIL) + 2
    assert [found[row["job"]] for row in good] == good
    for name, what in evil.items():
        assert str(found[name]["error"]).startswith("Cannot read its files: "), what
        assert found[name]["status"] == "failed"
    assert found["caf?"]["status"] == "not run"
    assert "is a link" in str(found["a link"]["error"])


def test_what_can_be_read_of_a_job_is_there_beside_what_cannot(make_job: MakeJob, sweep: Path) -> None:
    folder = make_job("lr=0.1", status="completed", loss=0.5)
    (folder / "events.out.tfevents.9").mkdir()
    (job,) = read_jobs(sweep)
    assert (job.status, job.objective) == ("completed", 0.5)
    assert job.error.startswith("Cannot read its files: events.out.tfevents.9 must be a regular file")


@pytest.mark.parametrize(
    "content",
    [
        "[]", "hydra", "hydra: 3", "hydra: {sweeper: []}", "hydra: {overrides: {task: 3}}", "[" * 200_000,
        "a: !!set {}",
        f"hydra: {{sweeper: {{_target_: {MISSING}, params: [1]}}}}",
        f"hydra: {{sweeper: {{_target_: {MISSING}}}, overrides: {{task: ['lr=range(1e99)']}}}}",
        f"hydra: {{sweeper: {{_target_: {MISSING}}}, overrides: {{task: [[1], {{a: b}}]}}}}",
        "hydra: {job: {env_set: {DOWNSLOPE_COMMAND: [1]}}}",
        "hydra: {job: {env_set: {DOWNSLOPE_COMMAND: \"it's\"}}}",
    ],
)  # fmt: skip
def test_a_sweeps_own_file_may_have_any_shape(four_jobs: Path, content: str) -> None:
    good = rows(read_jobs(four_jobs))
    (four_jobs / "multirun.yaml").write_text(content)
    jobs = read_jobs(four_jobs)
    assert [row for row in rows(jobs) if row["job"] != "multirun.yaml"] == good
    assert jobs[0].command.startswith("python scripts/train.py lr=")


def test_a_stored_text_is_no_formula_and_steers_no_terminal(
    make_job: MakeJob, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formulas = ["=HYPERLINK(1)", "+1+1", "-1+1", "@SUM(1)"]
    for formula in formulas:
        make_job(f"data.path={formula}", f"{formula}=-0.5", f"name=\x1b[2J\x9b\u202e{formula}", status="failed",
                 error={"type": formula, "message": "\x1b]0;owned\x07"})  # fmt: skip
    report = make_report(sweep)
    print_report(report)
    said = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert "\x1b" not in report.page.read_text()
    with report.table.open(newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert {f"'{formula}" for formula in formulas} <= set(cells)
    assert "-0.5" in cells
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r") and cell != "-0.5"]


def test_the_greatest_stands_first_where_more_is_better_and_its_metrics_are_the_columns(
    make_job: MakeJob, sweep: Path
) -> None:
    for rate, accuracy in ((0.1, 0.75), (0.2, 0.875), (0.3, None)):
        metrics = {} if accuracy is None else {"train/loss": 0.1, "val/accuracy": accuracy, "val/loss": 0.2, "fid": 3.0}
        make_job(f"lr={rate}", lr=rate, status="completed", metrics=metrics, objective=accuracy, monitor="val/accuracy",
                 mode="max", curves={"val/accuracy": {1: 0.9375, 2: 0.5}})  # fmt: skip
    make_job("lr=0.4", lr=0.4)
    jobs = read_jobs(sweep)
    assert [job.overrides["lr"] for job in jobs] == ["0.2", "0.1", "0.3", "0.4"]
    assert [job.objective for job in jobs[:3]] == [0.875, 0.75, -math.inf]
    assert [job.best_objective for job in jobs] == [0.9375, 0.9375, 0.9375, None]
    columns = list(rows(jobs)[0])
    first = columns.index("val/accuracy")
    assert columns[first : first + 5] == ["val/accuracy", "val/loss", "train/loss", "fid", "best val/accuracy"]
    assert not {"excess_loss", "2/λ"} & set(columns)
    page = make_report(sweep).page.read_text()
    assert "The highest val/accuracy, 0.875" in page
    assert "least squares" not in page


def test_metrics_that_are_not_finite_are_nothing_in_the_table(make_job: MakeJob, sweep: Path) -> None:
    folder = make_job("lr=0.1", status="completed", loss=math.nan)
    assert json.loads((folder / "result.json").read_text())["metrics"]["val/loss"] is None
    (job,) = read_jobs(sweep)
    assert job.objective == math.inf
    assert rows([job], [])[0]["val/loss"] is None


@pytest.mark.parametrize("sweeper", SWEEPERS)
def test_a_job_that_was_killed_or_never_started_is_there_as_not_run(
    make_job: MakeJob, sweep: Path, sweeper: str
) -> None:
    make_job("lr=0.1", "seed=2", status="completed", loss=0.5)
    make_job("lr=0.2", "seed=2", lr=0.2)  # killed before its result
    sweeper = {"_target_": sweeper, "params": {"seed": "2,3"}}
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


def test_the_command_that_runs_it_again_keeps_the_flags_of_the_sweeps(make_job: MakeJob, sweep: Path) -> None:
    make_job("lr=0.1", status="completed", loss=0.5)
    variables = {"DOWNSLOPE_COMMAND": "python main.py --config-dir 'my conf' -cn mine"}
    (sweep / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"job": {"env_set": variables}}}))
    (job,) = read_jobs(sweep)
    assert job.command == "python main.py --config-dir 'my conf' -cn mine lr=0.1"


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


@pytest.mark.parametrize(
    ("tried", "rate"),
    [
        ([], 0.3),
        (["lr=0.31"], None),  # as good as the same
        (["lr=0.2"], None),  # on the way there the loss was higher
        (["lr=0.4"], 0.3),
        (["lr=0.05"], 0.3),  # on the other side
        (["lr=0.2,optimizer=adam"], 0.3),  # another sweep
    ],
)
def test_no_rate_is_suggested_at_or_beyond_one_that_did_worse(
    make_job: MakeJob, sweep: Path, tried: list[str], rate: float | None
) -> None:
    make_job("lr=0.1", lr=0.1, status="completed", loss=0.5, suggested_learning_rate=0.3)
    for overrides in tried:
        parts = overrides.split(",")
        make_job(*parts, lr=float(parts[0][3:]), status="completed", loss=0.6)
    assert next_rate(read_jobs(sweep)) == rate
