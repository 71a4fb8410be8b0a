"""What the tests share: scripts run as a person runs them, and the logs that they leave read by TensorBoard itself."""

import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small tensors, and every core has a test of its own

import pytest
from hydra.core.global_hydra import GlobalHydra
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """How a script ended, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """Runs `scripts/<name>.py` inside this process, in an empty folder: as a command does, without the imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored after the test, whatever the script makes of it
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers, show = logging.getLogger().handlers[:], warnings.showwarning

    def run(name: str, *arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        finally:
            GlobalHydra.instance().clear()
        return Outcome(code, *capsys.readouterr())

    yield run
    for number, handler in signals.items():
        signal.signal(number, handler)
    logging.captureWarnings(False)
    for handler in logging.getLogger().handlers:
        if handler not in handlers:
            handler.close()
    logging.getLogger().handlers[:], warnings.showwarning = handlers, show


def run_process(folder: Path, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `scripts/<name>.py` as a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def only_run(folder: Path) -> Path:
    """The one run below `outputs/runs`."""
    (run,) = (folder / "outputs" / "runs").iterdir()
    return run


def read_json(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


def read_events(run: Path) -> EventAccumulator:
    """What TensorBoard's own reader finds in a run's folder."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a tag."""
    return [(event.step, event.value) for event in read_events(run).Scalars(tag)]
