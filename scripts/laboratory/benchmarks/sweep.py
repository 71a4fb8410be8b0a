"""What a job of a sweep costs, one by one and at once, and whether a thousand leave anything behind in the process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
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
MOST_DIFFERENT = 1e-6
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


CASES = {
    "diabetes, SGD": ("lr=tag(log,interval(1e-4,1))", f"+trainer.max_steps={STEPS}"),
    "diabetes, Adam, cosine, clipped": (
        *("lr=tag(log,interval(1e-4,1))", f"+trainer.max_steps={STEPS}", "optimizer=adam", "scheduler=cosine"),
        "+trainer.gradient_clip_val=1.0",
    ),
    "digits, SGD": ("lr=tag(log,interval(1e-3,1))", "+trainer.max_steps=100", "experiment=digits"),
}
COLUMNS = ("case", "jobs", "seconds at once", "one run", "ratio", "CPU at once", "CPU of one run", "peak, MB",
           "worst difference", "of members", "diverged aside", "chaotic aside")  # fmt: skip


def at_once(jobs: int, rounds: int, sampled: int, cases: Iterable[str] = CASES) -> None:
    """Trains a dense sweep at once, in turn with one run, and holds sampled members against runs of their own."""
    rows = []
    for name in cases:
        task = CASES[name]
        num = jobs if "diabetes" in name else max(4, jobs // 16)
        with tempfile.TemporaryDirectory() as text:
            folder, many, one = Path(text), [], []
            for number in range(rounds):
                show_progress(f"{name}, {num} jobs at once, {number + 1} of {rounds}")
                flags = ("hydra/launcher=vectorized", f"hydra.sweeper.points={num}", f"hydra.sweep.dir=at_once{number}")
                many.append(_timed(folder, "-m", *task, *flags))
                one.append(_timed(folder, "lr=0.01", *task[1:], f"hydra.run.dir=one{number}"))
            show_progress(f"{name}, {sampled} jobs one by one")
            worst, compared, diverged, chaotic = _compare(folder, task, min(sampled, num))
        seconds, cpu, memory = (median(each[place] for each in many) for place in range(3))
        alone, alone_cpu = (median(each[place] for each in one) for place in range(2))
        figures = [f"{seconds:.1f}", f"{alone:.1f}", f"{seconds / alone:.1f}", f"{cpu:.1f}", f"{alone_cpu:.1f}"]
        rows.append(
            [name, str(num), *figures, f"{memory:.0f}", f"{worst:.1e}", str(compared), str(diverged), str(chaotic)]
        )
    show_progress("")
    note = "Whole commands, start, files and report included. Difference: ‖Δθ‖ ÷ ‖θ‖ of the last weights."
    print_report(COLUMNS, rows, [note])


def _timed(folder: Path, *arguments: str) -> tuple[float, float, float]:
    """Seconds by the clock and of the CPU, and the most memory in MB, of one command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments, "device=cpu"], cwd=folder, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):
        raise SystemExit(f"train.py {' '.join(arguments)} ended with exit code {process.returncode}")
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def _compare(folder: Path, task: Sequence[str], sampled: int) -> tuple[float, int, int, int]:
    """The worst difference of last weights to ordinary runs, and how many members were compared, diverged, chaotic.

    Chaotic is a member whose ordinary run, at a rate that differs in the seventh digit, ends as far away.
    """
    runs = [file.parent for file in (folder / "at_once0").glob("*/result.json")]
    runs.sort(key=lambda run: float(_result(run)["learning_rate"]))
    chosen = [runs[round(place * (len(runs) - 1) / (sampled - 1))] for place in range(sampled)]
    mine = {float(_result(run)["learning_rate"]): run for run in chosen if _result(run)["status"] != "diverged"}
    alone = _one_by_one(folder / "serial", task, mine)
    differences = {rate: _difference(run, alone[rate]) for rate, run in mine.items()}
    doubtful = {rate * (1 + 2e-7): rate for rate, each in differences.items() if each > MOST_DIFFERENT}
    nearby = _one_by_one(folder / "nearby", task, doubtful) if doubtful else {}
    chaotic = {
        rate for near, rate in doubtful.items() if _difference(nearby[near], alone[rate]) > differences[rate] / 10
    }
    worst = max(each for rate, each in differences.items() if rate not in chaotic)
    return worst, len(differences) - len(chaotic), len(chosen) - len(mine), len(chaotic)


def _one_by_one(sweep: Path, task: Sequence[str], rates: Iterable[float]) -> dict[float, Path]:
    values = ",".join(map(repr, rates))
    flags = ("callbacks=checkpoints", f"hydra.sweep.dir={sweep}")
    _timed(sweep.parent, "-m", f"lr={values}", *task[1:], *flags)
    return {float(_result(file.parent)["learning_rate"]): file.parent for file in sweep.glob("*/result.json")}


def _difference(run: Path, other: Path) -> float:
    mine, its = _weights(run), _weights(other)
    return float((mine - its).norm() / its.norm())


def _result(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


def _weights(run: Path) -> Any:
    import torch

    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([each.double().flatten() for each in state.values()])


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
