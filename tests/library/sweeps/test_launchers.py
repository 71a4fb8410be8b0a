"""Failures, folders and exit codes are the same whoever runs the jobs."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from downslope.runs.signals import ECHO
from tests.conftest import ROOT, read_json, run_process

pytestmark = pytest.mark.slow

SMALL = ("data=synthetic", "data.num_rows=60", "trainer=fast", "callbacks=none", "hydra.sweep.dir=s")
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
SUBMITIT = ("hydra/launcher=submitit_local",)
RAY = (
    "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false",
)  # fmt: skip
OPTUNA = ("hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=0", "lr=tag(log,interval(0.001,1))")


def need(extra: str) -> None:
    plugin = {"optuna": "hydra_optuna_sweeper"}.get(extra, f"hydra_{extra}_launcher")
    pytest.importorskip(f"hydra_plugins.{plugin}", reason=f"needs pip install -e '.[{extra}]'")


def statuses(sweep: Path) -> Counter[str]:
    return Counter(read_json(file.parent)["status"] for file in sweep.glob("*/result.json"))


def kill_the_first_job(sweep: Path) -> None:
    """As the system does where memory runs out; the process is known by the name of its TensorBoard file."""
    wait_for(lambda: any(sweep.glob("*/events.out.tfevents.*")))
    (file, *_) = sweep.glob("*/events.out.tfevents.*")
    os.kill(int(file.name.split(".")[-2]), signal.SIGKILL)


def is_alive(group: int) -> bool:
    """Whether any process of it is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "RAY_worker_niceness": "0"}  # not 15: they would wait for the tests beside them
    return subprocess.Popen(command, cwd=folder, start_new_session=True, env=environment, **output)


@pytest.mark.parametrize(("extra", "launcher"), [("joblib", JOBLIB), ("submitit", SUBMITIT)])
def test_jobs_run_at_once_and_those_that_failed_are_listed(
    extra: str, launcher: tuple[str, ...], tmp_path: Path
) -> None:
    need(extra)
    outcome = run_process(
        tmp_path, "train", "-m", *launcher, "lr=0.01,0.1", "device=cpu,gpu", "trainer.max_epochs=2", *SMALL
    )
    assert outcome.returncode == 1, outcome.stderr
    assert "2 failed:" in outcome.stdout
    assert statuses(tmp_path / "s") == {"completed": 2, "failed": 2}


def test_joblib_that_lost_a_worker_tells_which_jobs_died_and_the_same_command_runs_them(tmp_path: Path) -> None:
    need("joblib")
    arguments = (*JOBLIB, "lr=0.01,0.1", "trainer.max_epochs=300", *SMALL)
    sweep = start(tmp_path, *arguments)
    kill_the_first_job(tmp_path / "s")
    output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 1, output
    assert "its process died" in output
    again = run_process(tmp_path, "train", "-m", *arguments)
    assert again.returncode == 0, again.stderr
    assert statuses(tmp_path / "s") == {"completed": 2}


def test_ray_runs_the_job_of_a_killed_worker_again(tmp_path: Path) -> None:
    need("ray")
    sweep = start(tmp_path, *RAY, "lr=0.01,0.1", "device=cpu,gpu", "trainer.max_epochs=300", *SMALL)
    kill_the_first_job(tmp_path / "s")
    output, _ = sweep.communicate(timeout=240)
    assert sweep.returncode == 1, output
    assert "will be retried" in output
    assert "2 failed:" in output
    assert statuses(tmp_path / "s") == {"completed": 2, "failed": 2}


@pytest.mark.parametrize(
    ("extra", "launcher", "number", "everywhere"),
    [
        ("joblib", JOBLIB, signal.SIGINT, True),  # as Ctrl-C in a terminal, which reaches every process
        ("joblib", JOBLIB, signal.SIGTERM, False),
        ("submitit", SUBMITIT, signal.SIGINT, True),
        ("ray", RAY, signal.SIGTERM, False),
    ],
)
def test_a_signal_stops_every_job_where_it_can_be_gone_on_with(
    extra: str, launcher: tuple[str, ...], number: signal.Signals, everywhere: bool, tmp_path: Path
) -> None:
    need(extra)
    arguments = (
        *launcher,
        "lr=0.01,0.1,0.2",
        "trainer.max_epochs=600",
        *SMALL[:2],
        "callbacks=checkpoints",
        SMALL[-1],
    )
    sweep = start(tmp_path, *arguments)
    wait_for(lambda: len(list(tmp_path.glob("s/*/events.out.tfevents.*"))) >= 2)
    for _ in range(2):  # as `timeout` sends one, to the process and to its group
        (os.killpg if everywhere else os.kill)(sweep.pid, number)
        time.sleep(0.02)
    output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 128 + number, output
    assert "stopping: running jobs save" in output
    assert "failed" not in output
    begun = [file.parents[1] for file in tmp_path.glob("s/*/.hydra/config.yaml")]
    assert {read_json(job)["status"] for job in begun} == {"interrupted"}
    assert all((job / "checkpoints" / "last.ckpt").exists() for job in begun)
    assert not list(tmp_path.glob("s/.stop*"))
    if extra == "joblib" and everywhere:
        again = run_process(tmp_path, "train", "-m", *arguments)
        assert again.returncode == 0, again.stderr
        results = [read_json(file.parent) for file in tmp_path.glob("s/*/result.json")]
        assert [(each["status"], each["num_optimizer_steps"]) for each in results] == [("completed", 600)] * 3


def test_a_second_signal_leaves_at_once_and_a_third_does_not_get_in_the_way(tmp_path: Path) -> None:
    need("joblib")
    sweep = start(tmp_path, *JOBLIB, "lr=0.01,0.1", "trainer.max_epochs=100000", *SMALL)  # whose jobs do not save
    wait_for(lambda: len(list(tmp_path.glob("s/*/events.out.tfevents.*"))) >= 2)
    for pause in (2 * ECHO, 0.05, 0):  # the third while joblib kills its processes: no exception may end that
        os.kill(sweep.pid, signal.SIGINT)
        time.sleep(pause)
    output, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, output
    assert "To resume:" in output
    assert "Traceback" not in output
    wait_for(lambda: not is_alive(sweep.pid))


def test_optuna_searches_a_range_and_the_same_seed_finds_its_jobs_again(tmp_path: Path) -> None:
    need("optuna")
    arguments = ("-m", *OPTUNA, "hydra.sweeper.n_trials=3", "trainer.max_epochs=2", *SMALL)
    outcome = run_process(tmp_path, "train", *arguments)
    assert outcome.returncode == 0, outcome.stderr
    rates = [read_json(file.parent)["learning_rate"] for file in tmp_path.glob("s/*/result.json")]
    assert len(set(rates)) == 3
    assert all(0.001 <= rate <= 1 for rate in rates)
    again = run_process(tmp_path, "train", *arguments)
    assert again.stdout.count("kept ") == 3


def test_a_range_that_reaches_an_impossible_value_is_refused(tmp_path: Path) -> None:
    need("optuna")
    outcome = run_process(tmp_path, "train", "-m", *OPTUNA[:2], "lr=interval(0,1)", *SMALL)
    assert outcome.returncode == 1
    assert "`lr` must be a finite number greater than 0, got 0.0" in outcome.stderr
    assert not (tmp_path / "s").exists()
