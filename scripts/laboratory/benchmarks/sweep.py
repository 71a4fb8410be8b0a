"""What a job of a sweep costs, and whether a thousand of them leave anything behind in the process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from benchmarks.report import print_report, show_progress

TRAIN = Path(__file__).parents[2] / "train.py"
STEPS = 300
HEADER = ("jobs", "seconds a job", "CPU seconds a job", "memory, MB", "open files", "threads")
Row = dict[str, float]


class Probe(Callback):
    """Writes down what the process has used, after each job and when all are done."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        self._write()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._write()

    def _write(self) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        row = {
            "wall": time.perf_counter(),
            "cpu": time.process_time(),
            "memory": int(status["VmRSS"].split()[0]) / 1024,
            "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            "threads": int(status["Threads"]),
        }
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def sweep(jobs: int) -> None:
    """Runs a sweep of so many learning rates, and the same once more, when every job is kept."""
    if not Path("/proc/self/status").is_file():
        raise SystemExit("benchmark.py sweep reads memory, files and threads from /proc, which Linux alone has.")
    with tempfile.TemporaryDirectory() as folder:
        show_progress(f"sweep: {jobs} jobs")
        rows = _run(Path(folder), jobs)[:-1]
        show_progress(f"sweep: {jobs} kept jobs")
        kept = _run(Path(folder), jobs)[-1]["cpu"] - _run(Path(folder), 1)[-1]["cpu"]
    show_progress("")
    tenth = max(2, jobs // 10)
    middle = (jobs - tenth) // 2
    parts = [rows[:tenth], rows[middle : middle + tenth], rows[-tenth:]]
    notes = [
        f"`train.py -m lr=…` in one process, {STEPS} steps a job of the diabetes table with the default observers: "
        "the first, the middle and the last tenth of the sweep, and all of it.",
        f"The same command once more: a kept job costs {1000 * kept / max(jobs - 1, 1):.1f} ms of CPU time.",
    ]
    print_report(HEADER, [_row(part, rows) for part in [*parts, rows]], notes)


def _run(folder: Path, jobs: int) -> list[Row]:
    file = folder / "probe.jsonl"
    file.unlink(missing_ok=True)
    rates = ",".join(f"{0.0001 * (number + 1):.4f}" for number in range(jobs))
    command = [
        *(sys.executable, str(TRAIN), "-m", f"lr={rates}", f"+trainer.max_steps={STEPS}", "device=cpu"),
        *("+hydra.callbacks.probe._target_=benchmarks.sweep.Probe", f"+hydra.callbacks.probe.file={file}"),
        f"hydra.sweep.dir={folder}/sweep",
    ]
    environment = {**os.environ, "PYTHONPATH": str(TRAIN.parent / "laboratory")}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"train.py ended with exit code {process.returncode}:\n{process.stdout}\n{process.stderr}")
    return [json.loads(line) for line in file.read_text().splitlines()]


def _row(part: list[Row], rows: list[Row]) -> list[str]:
    first, last = rows.index(part[0]), rows.index(part[-1])
    wall, cpu = ([after[what] - before[what] for before, after in pairwise(part)] for what in ("wall", "cpu"))
    return [
        f"{first + 1:,}–{last + 1:,}",
        *(f"{median(values):.2f}" for values in (wall, cpu)),
        *(f"{part[-1][what]:.0f}" for what in ("memory", "files", "threads")),
    ]
