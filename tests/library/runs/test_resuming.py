import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.optim.optimizer import register_optimizer_step_post_hook

from downslope.runs.checkpoints import load_checkpoint, write_checkpoint
from downslope.runs.folder import LOCK
from tests.conftest import ROOT, Outcome, read_json, scalars

Script = Callable[..., Outcome]
LAST = Path("checkpoints/last.ckpt")


@pytest.fixture
def run(script: Script, tmp_path: Path) -> Path:
    table = "\n".join(f"{index},{index % 7},{3 * index + index % 5}" for index in range(40))
    (tmp_path / "t.csv").write_text(f"a,b,y\n{table}\n")
    settings = ("trainer.max_epochs=3", "data=table", "data.path=t.csv", "data.target=y", "data.batch_size=8")
    assert script("train", "hydra.run.dir=run", *settings).code == 0
    return tmp_path / "run"


@pytest.fixture
def stopped(run: Path) -> Path:
    """A run that has not ended: its checkpoint is there, its result is not."""
    (run / "result.json").unlink()
    return run


def test_a_run_that_has_ended_says_so(script: Script, run: Path) -> None:
    before = (run / LAST).read_bytes()
    ended = script("train", "resume=run")
    assert ended.code == 0
    assert "ended at step 12, completed" in ended.out
    assert (run / LAST).read_bytes() == before


def test_a_run_that_another_process_works_on_is_left_alone(script: Script, stopped: Path) -> None:
    before = (stopped / LAST).read_bytes()
    with FileLock(stopped / LOCK):
        ended = script("train", "resume=run")
    assert ended.code == 1
    assert ended.err.startswith(f"error: Another process is working on '{stopped}'. Wait until it ends, or stop it")
    assert len(ended.err.splitlines()) == 1
    assert (stopped / LAST).read_bytes() == before
    assert script("train", "resume=run").code == 0


def test_a_new_run_in_the_folder_of_another_is_refused_with_both_ways_out(script: Script, stopped: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in stopped.rglob("*")}
    ended = script("train", "hydra.run.dir=run", "trainer.max_epochs=1")
    assert ended.code == 1
    assert f"got '{stopped}'. To resume that run: resume={stopped}. For a new run: choose another" in ended.err
    assert {file: file.stat().st_mtime_ns for file in stopped.rglob("*")} == before


@pytest.mark.parametrize("callbacks", ["default", "none"])
def test_a_run_whose_folder_is_moved_away_reports_no_success(script: Script, tmp_path: Path, callbacks: str) -> None:
    steps = iter(range(100))

    def move(*_: object) -> None:
        if next(steps) == 2:
            (tmp_path / "run").rename(tmp_path / "moved")

    handle = register_optimizer_step_post_hook(move)
    try:
        ended = script("train", "hydra.run.dir=run", "trainer.max_epochs=1", f"callbacks={callbacks}")
    finally:
        handle.remove()
    assert ended.code == 1
    assert f"cannot be written to {tmp_path / 'run'}" in ended.err
    assert not (tmp_path / "run").exists()


def test_more_epochs_end_in_the_bits_of_a_run_that_had_them_from_the_start(script: Script, run: Path) -> None:
    overrides = read_json(run)["overrides"][1:]
    assert script("train", "resume=run", "resume_override=[trainer.max_epochs]", "trainer.max_epochs=5").code == 0
    assert script("train", "hydra.run.dir=long", "trainer.max_epochs=5", *overrides).code == 0
    here, there = (torch.load(folder / LAST, weights_only=True) for folder in (run, run.parent / "long"))
    assert all(torch.equal(here["state_dict"][name], value) for name, value in there["state_dict"].items())
    assert here["global_step"] == there["global_step"] == 20
    assert read_json(run)["metrics"] == read_json(run.parent / "long")["metrics"]


def test_a_table_in_a_file_is_resumed_to_the_bit(script: Script, run: Path) -> None:
    stored = [*read_json(run)["overrides"][2:], "data.in_memory=false"]
    assert script("train", "hydra.run.dir=short", "trainer.max_epochs=1", *stored).code == 0
    more = ("resume_override=[trainer.max_epochs]", "trainer.max_epochs=3")
    assert script("train", "resume=short", *more).code == 0
    assert script("train", "hydra.run.dir=long", "trainer.max_epochs=3", *stored).code == 0
    here, there = (torch.load(run.parent / name / LAST, weights_only=True) for name in ("short", "long"))
    assert here["global_step"] == there["global_step"] == 12
    assert all(torch.equal(here["state_dict"][name], value) for name, value in there["state_dict"].items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=0.1"], r"lr is 0\.02 in the run, got 0\.1\. .*resume_override=\[lr\] lr=0\.1"),
        (["optimizer=adam"], r"optimizer is sgd in the run, got adam"),
        (["optimizer=adam", "resume_override=[optimizer]"], r"different optimizer: torch.*SGD there, torch.*Adam here"),
        (["model=manual", "resume_override=[model]"], r"different model: .*LinearRegression there, .*ManualLinear"),
        (["seed=4", "resume_override=[seed]"], r"Cannot change `seed` .* seed is 0 in the run, got 4"),
        (["data=diabetes"], r"Cannot change `data` .* data is table in the run, got diabetes"),
        (["resume_override=[lr]"], r"`resume_override` must name keys that the same command sets, got 'lr'"),
    ],
)
def test_what_differs_from_the_run_is_refused_with_both_values(
    script: Script, stopped: Path, arguments: list[str], message: str
) -> None:
    ended = script("train", "resume=run", *arguments)
    assert ended.code == 1
    assert __import__("re").search(message, ended.err), ended.err
    assert not (stopped / "result.json").exists()


def test_a_changed_learning_rate_is_followed_where_it_is_meant(script: Script, stopped: Path) -> None:
    shutil.copytree(stopped, stopped.parent / "same")
    more = ("trainer.max_epochs=4", "lr=0.002", "resume_override=[trainer.max_epochs,lr]")
    assert script("train", "resume=run", *more).code == 0
    group = torch.load(stopped / LAST, weights_only=True)["optimizer_states"][0]["param_groups"][0]
    assert group["lr"] == pytest.approx(0.002)
    assert "lr: 0.002\n" in (stopped / ".hydra" / "config.yaml").read_text()
    assert "resume: null" in (stopped / ".hydra" / "config.yaml").read_text()


def test_a_table_that_has_changed_since_is_refused(script: Script, stopped: Path) -> None:
    file = stopped.parent / "t.csv"
    file.write_text(file.read_text().replace("\n5,5,", "\n5,5.5,"))
    ended = script("train", "resume=run")
    assert ended.code == 1
    assert "different set of data: a, b → y, 40 rows, sha256 " in ended.err


def test_another_runs_checkpoint_is_refused(script: Script, stopped: Path) -> None:
    assert script("train", "hydra.run.dir=other", "trainer.max_epochs=1").code == 0
    for name in ("last", "best"):
        shutil.copy(stopped.parent / "other" / "checkpoints" / f"{name}.ckpt", stopped / "checkpoints")
    ended = script("train", "resume=run")
    assert ended.code == 1
    assert "made with a different set of weights" in ended.err


def test_other_versions_are_told_of_and_what_cannot_be_loaded_is_one_message(script: Script, stopped: Path) -> None:
    saved = load_checkpoint(stopped / LAST)
    saved["progress"]["versions"]["torch"] = "1.0"
    write_checkpoint(saved, stopped / LAST)
    ended = script("train", "resume=run")
    assert ended.code == 0
    assert f"the last bits may differ: torch 1.0 there, {torch.__version__} here." in ended.err
    saved["loops"] = {"fit_loop": 3}
    write_checkpoint(saved, stopped / LAST)
    (stopped / "result.json").unlink()
    ended = script("train", "resume=run")
    assert ended.code == 1
    assert "last.ckpt does not hold what a run saves: " in ended.err


@pytest.mark.parametrize("what", ["nowhere", "nothing"])
def test_nothing_to_go_on_from_is_an_error(script: Script, stopped: Path, what: str) -> None:
    shutil.rmtree(stopped / "checkpoints")
    ended = script("train", "resume=nowhere" if what == "nowhere" else "resume=run")
    assert ended.code == 1
    assert "`resume` must be the folder of a run" in ended.err


def test_a_run_killed_before_it_wrote_its_result_writes_it_when_gone_on_with(script: Script, stopped: Path) -> None:
    assert script("train", "resume=run").code == 0
    assert read_json(stopped)["status"] == "completed"
    assert read_json(stopped)["metrics"]["train/loss"] > 0


def test_a_run_killed_when_its_training_was_done_is_not_validated_again(script: Script, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert script("train", "hydra.run.dir=run", "trainer.max_epochs=2").code == 0
    before = {tag: scalars(run, tag) for tag in ("val/loss", "test/loss", "Loss/log10_val")}
    assert [step for step, _ in before["val/loss"]] == [6, 12]
    (run / "result.json").unlink()
    assert script("train", "resume=run").code == 0
    assert {tag: scalars(run, tag) for tag in before} == before
    assert read_json(run)["metrics"]["val/loss"] == pytest.approx(before["val/loss"][-1][1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_run_that_can_be_gone_on_with(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train.py")]
    settings = ["hydra.run.dir=run", "trainer.max_epochs=1000000", "callbacks.checkpoints.every_n_seconds=0.5"]
    process = subprocess.Popen([*command, *settings], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoints").exists():
        time.sleep(0.05)
        assert process.poll() is None
    for _ in range(2):  # as `timeout` sends one, to the process and to its group
        process.send_signal(number)
        time.sleep(0.02)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "resume    python scripts/train.py resume=run" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    saved = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert result["status"] == "interrupted"
    assert result["num_optimizer_steps"] == saved["global_step"] > 0


@pytest.mark.parametrize("model", ["automatic", "manual"])
def test_a_schedule_ends_where_the_run_ends_whatever_ends_it(script: Script, tmp_path: Path, model: str) -> None:
    settings = [f"model={model}", "scheduler=cosine", "logger=csv", "callbacks.learning_rate_effects.every_n_steps=1"]
    more = ("resume=run", "resume_override=[trainer.max_epochs]", "trainer.max_epochs=4")  # 6 steps an epoch
    assert script("train", "hydra.run.dir=run", "trainer.max_epochs=2", *settings).code == 0
    assert script("train", *more).code == 0
    assert script("train", "hydra.run.dir=steps", "trainer.max_epochs=-1", "+trainer.max_steps=8", *settings).code == 0

    def expected(first: int, last: int, num_steps: int) -> list[float]:
        return [0.01 * (1 + math.cos(math.pi * step / num_steps)) for step in range(first, last)]

    assert rates(tmp_path / "run", 0) == pytest.approx(expected(0, 12, 12), abs=1e-8)
    assert rates(tmp_path / "run", 1)[1:] == pytest.approx(expected(13, 24, 24), abs=1e-8)  # and not up from 0 again
    assert rates(tmp_path / "steps", 0) == pytest.approx(expected(0, 8, 8), abs=1e-8)


def rates(run: Path, version: int) -> list[float]:
    with (run / "csv" / f"version_{version}" / "metrics.csv").open() as stream:
        return [float(row["learning_rate/SGD"]) for row in csv.DictReader(stream) if row["learning_rate/SGD"]]


def test_a_new_schedule_stands_where_it_would_had_the_run_begun_with_it(script: Script, tmp_path: Path) -> None:
    every_step = ("data=synthetic", "logger=csv", "callbacks.learning_rate_effects.every_n_steps=1")  # 13 an epoch
    assert script("train", *every_step, "trainer.max_epochs=1", "hydra.run.dir=run").code == 0
    changed = ("trainer.max_epochs=3", "scheduler=cosine")
    assert script("train", "resume=run", "resume_override=[trainer.max_epochs,scheduler]", *changed).code == 0
    falling = [0.01 * (1 + math.cos(math.pi * step / 39)) for step in range(39)]
    assert rates(tmp_path / "run", 0) == pytest.approx([0.02] * 13)
    assert rates(tmp_path / "run", 1) == pytest.approx(falling[13:], abs=1e-8)
    assert read_json(tmp_path / "run")["overrides"] == ["data=synthetic", *every_step[1:], *changed]
    constant = ("trainer.max_epochs=4", "scheduler=constant", "lr=0.01")
    assert script("train", "resume=run", "resume_override=[trainer.max_epochs,scheduler,lr]", *constant).code == 0
    assert rates(tmp_path / "run", 2) == pytest.approx([0.01] * 13)


def test_a_resume_that_is_refused_changes_nothing(script: Script, run: Path) -> None:
    before = (run / ".hydra" / "config.yaml").read_bytes()
    refused = script("train", "resume=run", "resume_override=[optimizer]", "optimizer=adam")
    assert refused.code == 1
    assert "made with a different optimizer: torch.optim.sgd.SGD there, torch.optim.adam.Adam here." in refused.err
    assert (run / ".hydra" / "config.yaml").read_bytes() == before
    manual = (*("model=manual", "data=synthetic"), "trainer.max_epochs=1", "hydra.run.dir=manual")
    assert script("train", *manual).code == 0
    changed = ("resume_override=[trainer.max_epochs,scheduler]", "trainer.max_epochs=2", "scheduler=cosine")
    refused = script("train", "resume=manual", *changed)
    assert "made with a different scheduler: none there, torch.optim.lr_scheduler.LambdaLR here." in refused.err


@pytest.mark.parametrize("model", ["automatic", "manual"])
def test_a_plateau_is_waited_for_in_the_epochs_that_validate(script: Script, tmp_path: Path, model: str) -> None:
    never_better = ("scheduler.scheduler.patience=0", "+scheduler.scheduler.threshold=10")
    every_second = "+trainer.check_val_every_n_epoch=2"
    ended = script(
        "train",
        f"model={model}",
        "scheduler=plateau",
        *never_better,
        every_second,
        "trainer.max_epochs=5",
        "hydra.run.dir=run",
    )
    assert ended.code == 0, ended.err
    optimizer = torch.load(tmp_path / "run" / LAST, weights_only=True)["optimizer_states"][0]
    # Looked at after epochs 2 and 4, and never ten times better.
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.0002)


def test_a_folder_may_be_named_by_a_way_back_or_by_a_number(script: Script, run: Path) -> None:
    assert "ended at step 12" in script("train", "resume=nowhere/../run").out
    refused = script("train", "resume=2026")
    assert refused.code == 1
    assert refused.err.startswith("error: `resume` must be the folder of a run")
