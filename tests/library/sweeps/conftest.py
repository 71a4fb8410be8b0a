"""Sweeps as jobs leave them behind, without the jobs: files written by TensorBoard's and PyYAML's own writers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from downslope.runs.result import Result

MakeJob = Callable[..., Path]


def write_curves(folder: Path, curves: Mapping[str, Mapping[int, float]]) -> None:
    writer = EventFileWriter(str(folder))
    for tag, curve in curves.items():
        for step, value in curve.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=step, summary=summary))
    writer.close()


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return tmp_path / "rates"


@pytest.fixture
def make_job(sweep: Path) -> MakeJob:
    """Makes a job's folder out of its overrides, what its result holds (None: it has none), and its curves."""

    def make(
        *overrides: str, curves: Mapping[str, Mapping[int, float]] | None = None, lr: float = 0.1, **result: Any
    ) -> Path:
        folder = sweep / f"job{len(list(sweep.glob('job*'))):03}"
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"lr": lr, "seed": 1}))
        write_curves(folder, curves or {})
        loss = result.pop("loss", None)
        if result:
            metrics = {} if loss is None else {"val/loss": loss, "train/loss": loss / 2}
            judged = {"monitor": "val/loss", "objective": loss}
            Result(**{"learning_rate": lr, "metrics": metrics, **judged, **result}).write(folder)
        return folder

    return make


@pytest.fixture
def four_jobs(sweep: Path, make_job: MakeJob) -> Path:
    """Two that end, one that diverges, one that fails."""
    falling = {"val/loss": {1: 0.9, 2: 0.3, 3: 0.5}, "gradient_norm/total": {1: 1.0, 3: 0.1}}
    limit = {"largest_stable_learning_rate": 0.25}
    make_job("lr=0.1", "device=cpu", lr=0.1, status="completed", loss=0.5, curves=falling, **limit)
    make_job("lr=0.2", "device=cpu", lr=0.2, status="completed", loss=0.4, curves=falling,
             suggested_learning_rate=0.15, verdict="converged", **limit)  # fmt: skip
    make_job("lr=0.4", "device=cpu", lr=0.4, status="diverged", loss=1e7, **limit)
    make_job(
        "lr=0.1", "device=gpu", lr=0.1, status="failed", error={"type": "ValueError", "message": "no <gpu> & such"}
    )
    return sweep
