"""Each job once, as if alone, with an exit code that tells the truth."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Outcome, only_run, read_json, run_process

TINY = ("trainer.max_epochs=2", "hydra.sweep.dir=sweep")


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    return {file.parent.name: json.loads(file.read_text())["metrics"] for file in folder.glob("*/result.json")}


@pytest.mark.filterwarnings("ignore:Diverged")
def test_a_failing_and_a_diverging_job_leave_the_others_alone(script: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = script("train", "-m", "lr=0.01,5", "device=cpu,gpu", *TINY)
    assert outcome.code == 1
    states = {file.parent.name: read_json(file.parent)["status"] for file in tmp_path.glob("sweep/*/result.json")}
    assert states == {
        "device=cpu,lr=0.01,trainer.max_epochs=2": "completed",
        "device=cpu,lr=5,trainer.max_epochs=2": "diverged",
        "device=gpu,lr=0.01,trainer.max_epochs=2": "failed",
        "device=gpu,lr=5,trainer.max_epochs=2": "failed",
    }
    assert "2 failed:" in outcome.out
    assert (
        "`device=gpu`" in read_json(tmp_path / "sweep" / "device=gpu,lr=0.01,trainer.max_epochs=2")["error"]["message"]
    )
    assert script("train", "-m", "lr=0.01,5", "device=cpu", *TINY).code == 0


def test_the_same_command_again_keeps_what_has_ended_and_runs_what_is_new(
    script: Callable[..., Outcome], tmp_path: Path
) -> None:
    script("train", "-m", "lr=0.01,0.02", *TINY)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("sweep/*/result.json")}
    again = script("train", "-m", "lr=0.01,0.02,0.03", *TINY)
    assert again.code == 0
    assert "kept 2 of 3 jobs" in again.out
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())
    assert len(metrics(tmp_path / "sweep")) == 3


def test_the_same_overrides_over_another_configuration_are_refused(
    script: Callable[..., Outcome], tmp_path: Path
) -> None:
    script("train", "-m", "lr=0.01", *TINY)
    file = next(tmp_path.glob("sweep/*/.hydra/config.yaml"))
    file.write_text(file.read_text().replace("seed: 0", "seed: 7"))
    outcome = script("train", "-m", "lr=0.01", *TINY)
    assert outcome.code == 1
    assert "-seed: 7" in outcome.err
    assert "+seed: 0" in outcome.err


def test_a_job_equals_the_same_job_alone_to_the_bit(script: Callable[..., Outcome], tmp_path: Path) -> None:
    script("train", "-m", "model=manual,automatic", "lr=0.01", "seed=3", *TINY)
    script("train", "model=automatic", "lr=0.01", "seed=3", TINY[0])
    (job,) = tmp_path.glob("sweep/*model=automatic*")
    assert read_json(job)["metrics"] == read_json(only_run(tmp_path))["metrics"]


def test_a_sweep_killed_in_the_middle_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    arguments = ("-m", "lr=0.01,0.02,0.03,0.04,0.05,0.06", "trainer.max_epochs=40")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments, "hydra.sweep.dir=killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(metrics(tmp_path / "killed")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= len(metrics(tmp_path / "killed")) < 6
    pair = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=200)[0] for process in pair)
    assert [process.returncode for process in pair] == [0, 0]
    assert said.count("look      make dashboard") == 6 - (said.count("kept ") + said.count("left ") - 6)
    assert run_process(tmp_path, "train", *arguments, "hydra.sweep.dir=whole").returncode == 0
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_sigterm_leaves_with_143_and_tells_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", "lr=0.01,0.02", "trainer.max_epochs=5000"]
    process = subprocess.Popen([*command, "hydra.sweep.dir=s"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("s/*/events*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"hydra.sweep.dir={tmp_path / 's'}" in out
    (result,) = tmp_path.glob("s/*/result.json")
    assert read_json(result.parent)["status"] == "interrupted"
