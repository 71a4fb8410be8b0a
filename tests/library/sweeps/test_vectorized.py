"""Jobs that are trained at once are jobs like any other, held against the same jobs run one by one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from template.regression.model import LinearRegression
from tests.conftest import ROOT, Outcome, read_json, scalars

FLAGS = ("-m", "device=cpu", "trainer.max_epochs=3")
AT_ONCE = "hydra/launcher=vectorized"


class LogsInItsLoss(LinearRegression):
    def loss(self, batch: Any) -> torch.Tensor:
        loss = super().loss(batch)
        self.log("inside", loss)
        return loss


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
    return state


def worst(one: Path, other: Path, name: str = "last") -> float:
    """The length of the difference of the weights, relative to theirs."""
    mine, yours = (torch.cat([each.flatten() for each in weights(run, name).values()]) for run in (one, other))
    return float((mine - yours).norm() / yours.norm())


def folders(sweep: Path) -> dict[str, Path]:
    return {file.parent.name: file.parent for file in sweep.glob("*/result.json")}


@pytest.mark.filterwarnings("ignore:Diverged")
@pytest.mark.parametrize(
    "task",
    [
        ("lr=0.01,0.1,2",),
        slow(("lr=0.001,0.1", "optimizer=adamw", "optimizer.weight_decay=0,0.5", "scheduler=cosine")),
        slow(("lr=0.01,0.1", "optimizer=momentum", "scheduler=step", "+trainer.gradient_clip_val=0,0.1,1.5")),
        slow(("lr=0.1,0.5", "experiment=digits", "scheduler=warmup_cosine")),
    ],
    ids=["line", "adamw", "clipped", "network"],
)
def test_every_job_ends_where_an_ordinary_run_ends(
    script: Callable[..., Outcome], tmp_path: Path, task: tuple[str, ...]
) -> None:
    at_once = script("train", *FLAGS, *task, AT_ONCE, "hydra.sweep.dir=at_once")
    assert at_once.code == 0
    assert "jobs at once, which differ in lr" in at_once.out
    assert "one by one" not in at_once.out
    assert script("train", *FLAGS, *task, "hydra.sweep.dir=serial").code == 0
    found, expected = folders(tmp_path / "at_once"), folders(tmp_path / "serial")
    assert {*found} == {*expected}
    for name, run in found.items():
        mine, yours = read_json(run), read_json(expected[name])
        for key in ("status", "learning_rate", "num_optimizer_steps", "overrides", "monitor", "seed"):
            assert mine[key] == yours[key], (name, key)
        assert mine["num_validation_rows"] == yours["num_validation_rows"] > 0
        assert mine["objective"] == pytest.approx(yours["objective"], rel=1e-5)
        assert worst(run, expected[name]) < 1e-6
        assert worst(run, expected[name], "best") < 1e-6
        for tag in ("val/loss", "train/loss", "Loss/log10_val", "Loss/log10_train"):
            steps, losses = zip(*scalars(run, tag), strict=True)
            their_steps, their_losses = zip(*scalars(expected[name], tag), strict=True)
            assert losses == pytest.approx(their_losses, rel=1e-5, abs=1e-5 if "log10" in tag else 0)
            if "experiment=digits" not in task:  # whose module leaves it to Lightning, which counts from 0
                assert steps == their_steps
        if "experiment=digits" not in task:
            assert scalars(run, "train/excess_loss")[0][0] == scalars(run, "test/loss")[0][0]
        theirs = scalars(expected[name], "gradient_norm/total")
        assert dict(scalars(run, "gradient_norm/total")) == pytest.approx(dict(theirs), rel=1e-5)
        for file in ("config.yaml", "overrides.yaml"):
            assert (run / ".hydra" / file).read_text() == (expected[name] / ".hydra" / file).read_text()


@pytest.mark.slow
def test_a_job_is_kept_evaluated_and_resumed_as_any_other(script: Callable[..., Outcome], tmp_path: Path) -> None:
    rates = ("optimizer=adam", "scheduler=cosine", "+scheduler.scheduler.num_steps=36")
    assert script("train", *FLAGS, *rates, "lr=0.01,0.1", AT_ONCE, "hydra.sweep.dir=sweep").code == 0
    more = script("train", *FLAGS, *rates, "lr=0.01,0.1,0.2", "hydra.sweep.dir=sweep")  # one by one, in the same folder
    assert "kept 2 of 3 jobs" in more.out
    job = next(folder for name, folder in folders(tmp_path / "sweep").items() if "lr=0.1," in name)
    assert script("evaluate", f"run={job}").code == 0
    assert script("predict", f"run={job}").code == 0
    assert script("train", f"resume={job}", "resume_override=[trainer.max_epochs]", "trainer.max_epochs=6").code == 0
    longer = (*rates, "lr=0.1", "device=cpu", "trainer.max_epochs=6")
    assert script("train", *longer, "hydra.run.dir=uninterrupted").code == 0
    assert worst(job, tmp_path / "uninterrupted") < 5e-6


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (("data.batch_size=32,64",), "no other job differs from them only in numbers of the optimizer"),
        (("lr=0.01,0.1", "+trainer.accumulate_grad_batches=2"), "does not support trainer.accumulate_grad_batches"),
        slow(("lr=0.1,1", "optimizer=lbfgs", "data.batch_size=1000"), "LBFGS"),
        slow(("lr=0.01,0.1", "model=manual"), "ManualLinearRegression takes its optimizer steps itself"),
        slow(("lr=0.01,0.1", "scheduler=plateau"), "ReduceLROnPlateau waits for a metric"),
        slow(("lr=0.01,0.1", "+trainer.precision=bf16-mixed"), "does not support trainer.precision"),
        slow(("lr=0.01,0.1", f"model._target_={__name__}.LogsInItsLoss"), "they cannot be trained at once: Misconf"),
    ],
)
def test_what_cannot_be_trained_at_once_runs_one_by_one_and_says_why(
    script: Callable[..., Outcome], tmp_path: Path, task: tuple[str, ...], reason: str
) -> None:
    ended = script("train", "-m", "device=cpu", "trainer.max_epochs=1", *task, AT_ONCE, "hydra.sweep.dir=sweep")
    (line,) = [line for line in ended.out.splitlines() if "run one by one" in line]
    assert line.startswith("2 of 2 jobs run one by one: ")
    assert reason in line
    assert [read_json(run)["status"] for run in folders(tmp_path / "sweep").values()] == ["completed"] * 2


@pytest.mark.slow
def test_jobs_of_several_kinds_form_groups_and_a_device_that_is_missing_fails_its_own(
    script: Callable[..., Outcome], tmp_path: Path
) -> None:
    kinds = ("lr=0.01,0.02", "seed=0,1", "device=cpu,gpu", "trainer.max_epochs=1")
    ended = script("train", "-m", *kinds, AT_ONCE, "hydra.sweep.dir=sweep")
    assert ended.code == 1
    assert ended.out.count("2 jobs at once") == 4
    statuses = {name: read_json(run)["status"] for name, run in folders(tmp_path / "sweep").items()}
    assert len(statuses) == 8
    assert all(status == ("failed" if "gpu" in name else "completed") for name, status in statuses.items())


def test_an_interval_has_so_many_readable_values_which_are_trained_in_parts_that_fit_into_memory(
    script: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downslope.sweeps.vectorized.MOST_BYTES", 2 * 12 * 4 * 11)  # two lines of eleven numbers
    rates = ("lr=tag(log,interval(1e-3,0.1))", "hydra.sweeper.points=5")
    ended = script("train", *FLAGS, *rates, AT_ONCE, "hydra.sweep.dir=sweep")
    assert "in parts of 2" in ended.out
    names = {name.split(",")[1] for name in folders(tmp_path / "sweep")}
    assert names == {"lr=0.001", "lr=0.003162", "lr=0.01", "lr=0.03162", "lr=0.1"}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("-m", "lr=interval(0.1,1)", "hydra.sweeper.points=0"), "must be a whole number from 2 to 100,000, got 0."),
        (("-m", "lr=interval(0.1,1)", "hydra.sweeper.points=10000000"), "from 2 to 100,000, got 10000000."),
        (("-m", "lr=tag(log,interval(0,1))", "hydra.sweeper.points=9"), "an interval of two numbers above 0"),
        (("-m", "lr=interval(0.1,1)", "+optimizer.momentum=interval(0,0.9)", "hydra.sweeper.points=400"),
         "at most 100,000 jobs, got 400 × 400 = 160,000."),
        (("-m", "lr=interval(-1,1)", "hydra.sweeper.points=4"), "`lr` must be a finite number greater than 0, got -1"),
        (("-m", "lr=0.1", "+optimizer.momentum=0.5,-1"), "`optimizer`: Invalid momentum value: -1"),
        ((), "`hydra/launcher=vectorized` trains the jobs of a sweep at once, but this is a single run: add -m."),
    ],
)  # fmt: skip
def test_an_impossible_dense_sweep_is_refused_before_anything_is_written(
    script: Callable[..., Outcome], tmp_path: Path, typed: tuple[str, ...], message: str
) -> None:
    ended = script("train", *typed, AT_ONCE)
    assert ended.code == 1
    assert message in ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_kill_and_the_same_command_again_end_in_the_same_table(tmp_path: Path) -> None:
    rates = ("lr=tag(log,interval(1e-4,1))", "hydra.sweeper.points=300", "+optimizer.momentum=0,0.5")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *FLAGS, *rates, AT_ONCE]

    def sweep(name: str, **settings: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, f"hydra.sweep.dir={name}"], cwd=tmp_path, text=True, **settings)

    whole = sweep("whole", stdout=subprocess.DEVNULL)
    killed = sweep("killed", stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("killed/.vectorized-*/*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert whole.wait() == 0
    assert len(folders(tmp_path / "killed")) < 600
    assert sweep("killed", stdout=subprocess.DEVNULL).wait() == 0
    assert not list(tmp_path.glob("killed/.vectorized-*"))
    for name, run in folders(tmp_path / "whole").items():
        one, other = json.loads((run / "result.json").read_text()), read_json(tmp_path / "killed" / name)
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
        assert worst(run, tmp_path / "killed" / name) == 0
    shutil.rmtree(tmp_path / "whole")
