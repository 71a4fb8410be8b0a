"""Several processes a job inside a sweep."""

from collections.abc import Callable
from pathlib import Path

from tests.conftest import Outcome, read_json, run_process


def test_each_job_of_one_or_two_processes_runs_once(tmp_path: Path) -> None:
    outcome = run_process(
        tmp_path, "train", "-m", "trainer=ddp", "trainer.devices=1,2,1", "lr=0.01", "device=cpu", "seed=4",
        "trainer.max_epochs=2", "hydra.sweep.dir=s",
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    results = [read_json(file.parent) for file in tmp_path.glob("s/*/result.json")]
    assert [(each["status"], each["learning_rate"], each["seed"]) for each in results] == [("completed", 0.01, 4)] * 2
    assert outcome.stdout.count("kept ") == 1  # the second devices=1 is the first one again
    for job in tmp_path.glob("s/*/"):
        assert len(list(job.glob("events*"))) == 1


def test_five_processes_on_the_cpu_are_refused_unless_asked_for(script: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = script("train", "device=cpu", "trainer.devices=5")
    assert outcome.code == 1
    assert "trainer=ddp" in outcome.err
    assert not (tmp_path / "outputs").exists()
