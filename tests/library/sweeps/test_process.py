"""Several processes a job inside a sweep."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT, Outcome, read_json, run_process


@pytest.mark.slow
def test_each_job_of_one_or_two_processes_runs_once(tmp_path: Path) -> None:
    outcome = run_process(
        tmp_path, "train", "-m", "trainer=ddp", "trainer.devices=1,2,1", "lr=0.01", "device=cpu", "seed=4",
        "trainer.max_epochs=2", "callbacks=none", "hydra.sweep.dir=s",
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    results = [read_json(file.parent) for file in tmp_path.glob("s/*/result.json")]
    assert [(each["status"], each["learning_rate"], each["seed"]) for each in results] == [("completed", 0.01, 4)] * 2
    assert outcome.stdout.count("kept ") == 1  # the second devices=1 is the first one again
    for job in tmp_path.glob("s/*/"):
        assert len(list(job.glob("events*"))) == 1


PROJECT = {
    "main.py": """
        import json, os, sys
        from pathlib import Path
        import hydra
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf import OmegaConf
        from downslope.runs.result import Result
        from downslope.sweeps.job import run_job

        @hydra.main(version_base="1.3", config_path="settings", config_name="base")
        def main(config):
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                return run_job(config, train)
            return train(config)

        def train(config):
            folder = Path(HydraConfig.get().runtime.output_dir)
            flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
            handed = Path(flags["--config-path"], flags["--config-name"] + ".yaml")
            evidence = {"config": OmegaConf.to_container(config, resolve=True), "file": str(handed), "cwd": os.getcwd(),
                        "modes": [oct(each.stat().st_mode & 0o777) for each in (handed, handed.parent)],
                        "callbacks": list(HydraConfig.get().callbacks or {})}
            Result("completed", monitor="score", mode="max", objective=config.rate, evidence=evidence).write(folder)
            return config.rate

        main()
    """,
    "settings/base.yaml": """
        mode: max
        rate: 1.0
        twice: ${rate}
        where: ${hydra:runtime.output_dir}
        trainer: {strategy: ddp}
        hydra:
          sweep: {dir: sweep, subdir: "${hydra.job.num}"}
          callbacks: {mine: {_target_: hydra.experimental.callback.Callback}}
    """,
}


@pytest.mark.slow
def test_a_childs_configuration_comes_from_its_parent_in_a_private_file_whatever_the_project(tmp_path: Path) -> None:
    (tmp_path / "settings").mkdir()
    for name, content in PROJECT.items():
        (tmp_path / name).write_text(textwrap.dedent(content))
    command = [sys.executable, "main.py", "-m", "rate=2,3", "+twice_more=${twice}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for number, rate in enumerate((2, 3)):
        result = read_json(tmp_path / "sweep" / str(number))
        told = result["evidence"]
        assert (told["config"]["rate"], told["config"]["twice"], told["config"]["twice_more"]) == (rate, rate, rate)
        assert told["config"]["where"] == str(tmp_path / "sweep" / str(number))
        assert told["modes"] == ["0o600", "0o700"]
        assert not Path(told["file"]).is_relative_to(tmp_path)
        assert not Path(told["file"]).parent.exists()
        assert told["callbacks"] == []
        assert told["cwd"] == str(tmp_path)
        assert result["overrides"][0] == f"rate={rate}"


@pytest.mark.slow
def test_an_evil_folder_in_a_jobs_place_runs_nothing_in_any_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An honest job of two processes, interrupted; then somebody plants classes and callbacks in what it left."""
    (tmp_path / "importable").mkdir()
    (tmp_path / "importable" / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "importable"), prepend=os.pathsep)
    command = ("train", "-m", "trainer=ddp", "trainer.devices=2", "device=cpu", "lr=0.01,0.02", "trainer.max_epochs=1",
               "callbacks=checkpoints", "hydra.sweep.dir=s")  # fmt: skip
    assert run_process(tmp_path, *command).returncode == 0
    unfinished, finished = sorted(tmp_path.glob("s/*/"))
    (unfinished / "result.json").unlink()
    for job in (unfinished, finished):
        config = job / ".hydra" / "config.yaml"
        evil = {"_target_": "evil.Model"}
        planted = OmegaConf.merge(
            OmegaConf.load(config), {"model": evil, "callbacks": {"evil": evil}, "hydra": {"callbacks": {"evil": evil}}}
        )
        OmegaConf.save(planted, config)
    again = run_process(tmp_path, *command)
    assert not (tmp_path / "canary").exists(), again.stdout + again.stderr
    rows = (tmp_path / "s" / "sweep.csv").read_text()
    assert finished.name in rows
    assert unfinished.name in rows
    assert (
        subprocess.run([sys.executable, "-c", "import evil"], check=False).returncode == 0
    )  # it would have been noticed
    assert (tmp_path / "canary").exists()


def test_five_processes_on_the_cpu_are_refused_unless_asked_for(script: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = script("train", "device=cpu", "trainer.devices=5")
    assert outcome.code == 1
    assert "trainer=ddp" in outcome.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc, which Linux alone has")
def test_a_rank_that_dies_ends_its_job_and_the_sweep_goes_on(tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(ROOT / "scripts" / "train.py"), "-m", "trainer=ddp", "trainer.devices=2", "device=cpu"),
        *("trainer.max_epochs=100000,1", "hydra.sweep.dir=s"),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size > 3000 for file in tmp_path.glob("s/*=100000*/events*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (rank_0,) = children(process.pid)
    (rank_1,) = children(rank_0)
    os.kill(rank_1, signal.SIGKILL)
    killed = time.time()
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    jobs = {re.search(r"max_epochs=(\d+)", str(file))[1]: file for file in tmp_path.glob("s/*/result.json")}
    assert {epochs: read_json(file.parent)["status"] for epochs, file in jobs.items()} == {
        "100000": "failed",
        "1": "completed",
    }
    assert jobs["100000"].stat().st_mtime - killed < 30  # Lightning looks every 5 s, and this machine may be busy
    assert read_json(jobs["100000"].parent)["error"]["message"]
    assert "1 failed:" in out


def children(pid: int) -> list[int]:
    """The Python processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "train.py" in Path(f"/proc/{child}/cmdline").read_text()]
