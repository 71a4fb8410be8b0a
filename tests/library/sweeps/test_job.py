"""Each job once, as if alone, with an exit code that tells the truth."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from downslope.runs.result import Result, objective_of
from downslope.sweeps.job import LONGEST_NAME, job_name
from downslope.sweeps.process import isolated
from downslope.sweeps.table import read_jobs
from tests.conftest import ROOT, Outcome, only_run, read_json, run_process

TINY = ("trainer.max_epochs=2", "hydra.sweep.dir=sweep")
TRAIN = str(ROOT / "scripts" / "train.py")


def results(folder: Path) -> dict[str, dict[str, object]]:
    return {file.parent.name: read_json(file.parent) for file in folder.glob("*/result.json")}


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Diverged")
def test_a_failing_and_a_diverging_job_leave_the_others_alone(script: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = script("train", "-m", "lr=5,0.01", "device=gpu,cpu", *TINY)
    assert outcome.code == 1
    jobs = results(tmp_path / "sweep")
    assert {name: job["status"] for name, job in jobs.items()} == {
        "device=cpu,lr=0.01,trainer.max_epochs=2": "completed",
        "device=cpu,lr=5,trainer.max_epochs=2": "diverged",
        "device=gpu,lr=0.01,trainer.max_epochs=2": "failed",
        "device=gpu,lr=5,trainer.max_epochs=2": "failed",
    }
    (listed,) = re.findall(r"2 failed:\n  `device=gpu` must be .*\n    (.*)\n    (.*)\n", outcome.out)
    assert listed == ("device=gpu,lr=0.01,trainer.max_epochs=2", "device=gpu,lr=5,trainer.max_epochs=2")
    error = jobs["device=gpu,lr=5,trainer.max_epochs=2"]["error"]
    assert "`device=gpu`" in error["message"]
    assert "`device=gpu`" in (tmp_path / "sweep" / "device=gpu,lr=5,trainer.max_epochs=2" / "train.log").read_text()
    assert script("train", "-m", "lr=0.01,5", "device=cpu", *TINY).code == 0  # a smaller grid without the failed ones


@pytest.mark.slow
def test_what_has_ended_is_kept_and_another_base_configuration_refused(
    script: Callable[..., Outcome], tmp_path: Path
) -> None:
    script("train", "-m", "lr=0.01,0.02", *TINY)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("sweep/*/result.json")}
    larger = script("train", "-m", "lr=0.01,0.02,0.03", *TINY)
    assert larger.code == 0
    assert "kept 2 of 3 jobs" in larger.out
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())
    assert len(results(tmp_path / "sweep")) == 3

    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    main = conf / "train.yaml"
    main.write_text(main.read_text() + "\n# another comment is no other configuration\n")
    assert "kept 1 of 1 jobs" in script("train", "-m", "--config-path", str(conf), "lr=0.03", *TINY).out
    assert all(f" --config-path {conf} " in job.command for job in read_jobs(tmp_path / "sweep"))
    main.write_text(main.read_text().replace("\nseed: 0\n", "\nseed: 7\n"))
    outcome = script("train", "-m", "--config-path", str(conf), "lr=0.07,0.03", *TINY)
    assert outcome.code == 1
    assert "-seed: 0" in outcome.err
    assert "+seed: 7" in outcome.err
    assert len(results(tmp_path / "sweep")) == 3  # lr=0.07 stands before the one that is refused, and has not run


@pytest.mark.slow
def test_a_sweep_of_which_nothing_is_missing_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', '-m', 'lr=0.01,0.02', {TINY[0]!r}, {TINY[1]!r}]\n"
        "try:\n    runpy.run_path({0!r}, run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules)\n"
    ).replace("{0!r}", repr(TRAIN))
    said = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert said[0].endswith("True\n")
    assert "kept 2 of 2 jobs" in said[1]
    assert said[1].endswith("False\n")


def test_an_interpolation_in_an_override_follows_the_jobs_own_values(
    script: Callable[..., Outcome], tmp_path: Path
) -> None:
    quick = ("trainer.max_epochs=1", "callbacks=none", "logger=none")
    script("train", "-m", "lr=0.1,0.2", "optimizer.lr=${lr}", *quick, "hydra.sweep.dir=typed")
    script("train", "-m", "lr=0.1,0.2", *quick, "hydra.sweep.dir=plain")
    typed, plain = ({job["learning_rate"]: job["metrics"] for job in results(tmp_path / name).values()}
                    for name in ("typed", "plain"))  # fmt: skip
    assert typed == plain
    assert typed[0.1] != typed[0.2]
    assert all("optimizer.lr=${lr}" in job["overrides"] for job in results(tmp_path / "typed").values())
    again = script("train", "-m", "lr=0.1,0.2,0.3", "optimizer.lr=${lr}", *quick, "hydra.sweep.dir=typed")
    assert "kept 2 of 3 jobs" in again.out


def test_relative_paths_are_those_of_whoever_typed_them(script: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("x,y\n" + "".join(f"{row},{row % 7}\n" for row in range(60)))
    data = ("data=table", "data.path=table.csv", "data.target=y", "callbacks=none", "trainer.max_epochs=1")
    outcome = script("train", "-m", "lr=0.01", "hydra.job.chdir=True", *data, "hydra.sweep.dir=sweep")
    assert outcome.code == 0, outcome.err
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("place", ["", ".hydra", "checkpoints"])
def test_a_link_in_a_sweep_is_refused_and_nothing_behind_it_changes(
    script: Callable[..., Outcome], tmp_path: Path, place: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("as it was")
    job = tmp_path / "sweep" / "callbacks=none,lr=0.01"
    (job / place).parent.mkdir(parents=True, exist_ok=True)
    (job / place).symlink_to(elsewhere)
    outcome = script("train", "-m", "lr=0.01", "callbacks=none", "hydra.sweep.dir=sweep")
    assert outcome.code == 1
    assert "must be a file or a folder, got a link" in outcome.err
    assert [(file.name, file.read_text()) for file in elsewhere.iterdir()] == [("precious", "as it was")]


def test_a_folder_with_another_use_is_not_emptied(script: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "sweep" / "mine").mkdir(parents=True)
    (tmp_path / "sweep" / "mine" / "thesis.tex").write_text("precious")
    settings = ("callbacks=none", "trainer.max_epochs=1", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=mine")
    outcome = script("train", "-m", "lr=0.01", *settings)
    assert outcome.code == 1
    assert (tmp_path / "sweep" / "mine" / "thesis.tex").read_text() == "precious"


def test_a_job_equals_the_same_job_alone_to_the_bit(script: Callable[..., Outcome], tmp_path: Path) -> None:
    script("train", "-m", "model=manual,automatic", "lr=0.01", "seed=3", *TINY)
    script("train", "model=automatic", "lr=0.01", "seed=3", TINY[0])
    (job,) = tmp_path.glob("sweep/*model=automatic*")
    assert read_json(job)["metrics"] == read_json(only_run(tmp_path))["metrics"]


def test_nothing_that_a_job_changes_in_the_process_reaches_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOWNSLOPE_TEST", "before")

    def state() -> list[object]:
        return [
            torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(),
            torch.is_grad_enabled(), torch.get_num_threads(), os.environ.copy(), Path.cwd(), warnings.filters[:],
            random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),  # noqa: NPY002
        ]  # fmt: skip

    def spoil() -> None:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())
        torch.autograd.set_detect_anomaly(True)
        torch.set_grad_enabled(False)
        torch.set_num_threads(torch.get_num_threads() + 1)
        os.environ["DOWNSLOPE_TEST"] = os.environ["DOWNSLOPE_OTHER"] = "after"
        os.chdir(tmp_path)
        warnings.simplefilter("ignore", UserWarning)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        raise RuntimeError("and it fails")

    before = state()
    with pytest.raises(RuntimeError), isolated():
        spoil()
    assert state() == before
    with isolated():
        with contextlib.suppress(RuntimeError):
            spoil()
        assert all(old != new for old, new in zip(before, state(), strict=True))  # each of them can be seen
    assert state() == before


def test_an_objective_of_exactly_zero_is_the_best_and_not_a_missing_one() -> None:
    assert objective_of(Result(status="completed", objective=0.0)) == 0.0
    assert objective_of(Result(status="completed", objective=0.0), "max") == 0.0
    assert objective_of(Result(status="diverged", objective=0.0)) == float("inf")
    assert objective_of(None) == objective_of(Result(status="completed")) == float("inf")
    assert objective_of(None, "max") == float("-inf")


@pytest.mark.slow
def test_a_killed_sweep_that_two_processes_end_equals_one_that_was_not_killed(tmp_path: Path) -> None:
    arguments = ("-m", "lr=0.01,0.02,0.03,0.04,0.05,0.06", "trainer.max_epochs=20", "callbacks=checkpoints")
    command = [sys.executable, TRAIN, *arguments, "hydra.sweep.dir=killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(results(tmp_path / "killed")) >= 2)
    process.kill()
    process.wait()
    ended = len(results(tmp_path / "killed"))
    assert 2 <= ended < 6
    pair = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=300)[0] for process in pair)
    assert [process.returncode for process in pair] == [0, 0]
    assert said.count("look      make dashboard") == 6 - ended  # each job that was missing has run once
    assert run_process(tmp_path, "train", *arguments, "hydra.sweep.dir=whole").returncode == 0
    whole = results(tmp_path / "whole")
    assert len(whole) == 6
    killed = results(tmp_path / "killed")
    assert {name: job["metrics"] for name, job in killed.items()} == {
        name: job["metrics"] for name, job in whole.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_sweep_and_the_same_command_goes_on(tmp_path: Path, number: int, code: int) -> None:
    command = [sys.executable, TRAIN, "-m", "lr=0.01,0.02", "trainer.max_epochs=100000", "hydra.sweep.dir=s"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: [file for file in tmp_path.glob("s/*/events*") if file.stat().st_size > 5000])
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code
    assert f"hydra.sweep.dir={tmp_path / 's'}" in out
    (job,) = results(tmp_path / "s").values()  # the second has no result: it was not run
    assert job["status"] == "interrupted"
    assert job["num_optimizer_steps"] > 0
    assert list(tmp_path.glob("s/*/checkpoints/*.ckpt"))


def test_plain_overrides_are_the_name() -> None:
    assert job_name("device=cpu,lr=0.01") == "device=cpu,lr=0.01"


def test_odd_or_long_overrides_never_share_a_name() -> None:
    odd = ["data.path=a/b.csv", "data.path=a-b.csv", "data.path=a b.csv", "", ".", "x" * 300, "x" * 301, "a@b"]
    names = [job_name(each) for each in odd]
    assert len(set(names)) == len(odd)
    assert all(0 < len(name) <= LONGEST_NAME and "/" not in name and " " not in name for name in names)


def test_a_shortened_name_still_shows_what_it_begins_with() -> None:
    assert job_name("data.path=tables/houses.csv").startswith("data.path=tables-houses.csv@")
