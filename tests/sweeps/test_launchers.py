"""Failures, folders and exit codes are the same whoever runs the jobs."""

from pathlib import Path

import pytest

from tests.conftest import read_json, run_process


def test_joblib_runs_two_jobs_at_once_and_lists_the_one_that_failed(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install -e '.[joblib]'")
    outcome = run_process(
        tmp_path, "train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "lr=0.01,0.1", "device=cpu,gpu",
        "trainer.max_epochs=2", "hydra.sweep.dir=s",
    )  # fmt: skip
    assert outcome.returncode == 1, outcome.stderr
    assert "2 failed:" in outcome.stdout
    states = sorted(read_json(file.parent)["status"] for file in tmp_path.glob("s/*/result.json"))
    assert states == ["completed", "completed", "failed", "failed"]
