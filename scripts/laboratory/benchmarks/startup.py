"""How long a tiny run takes as a whole process, from the command to the prompt."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.report import installed, print_report, show_progress

BARE = str(Path(__file__).with_name("bare.py"))
TRAIN = str(Path(__file__).parents[2] / "train.py")
TINY = ("data=synthetic", "data.num_rows=100", "data.num_features=10", "trainer.max_epochs=1")
COMMANDS = {
    "bare script": (BARE,),
    "`train.py`": (TRAIN, *TINY),
    "`train.py ~callbacks.pictures`": (TRAIN, *TINY, "~callbacks.pictures"),
    "`train.py --help`": (TRAIN, "--help"),
    "`train.py --cfg job`": (TRAIN, "--cfg", "job"),
}
# Both sides compile their modules once, in the round to warm up, as on anyone's machine.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
HEADER = ("command", "median, s", "least, s", "ratio of medians", "median of the rounds' ratios")


def startup(rounds: int) -> None:
    """Measures every command in each round, and prints how it compares with the bare script."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name, command in COMMANDS.items():
                show_progress(f"startup, {f'round {number} of {rounds}' if number else 'warming up'}: {name}")
                taken = _wall_time([sys.executable, *command], folder)
                if number:  # the first run of a command reads it from the disk
                    seconds[name].append(taken)
    show_progress("")
    print_report(HEADER, [_row(name, taken, seconds["bare script"]) for name, taken in seconds.items()], _notes())


def _wall_time(command: list[str], folder: str) -> float:
    started = time.perf_counter()
    process = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    taken = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}:\n{process.stderr}")
    return taken


def _row(name: str, seconds: list[float], bare: list[float]) -> list[str]:
    ratio = median(seconds) / median(bare)
    by_round = median(each / yardstick for each, yardstick in zip(seconds, bare, strict=True))
    return [name, *(f"{value:.2f}" for value in (median(seconds), min(seconds), ratio, by_round))]


def _notes() -> list[str]:
    notes = [f"Whole processes, in turn. `train.py` is `python scripts/train.py {' '.join(TINY)}`."]
    if installed("scipy"):
        notes.append(
            "scipy is installed here. torchmetrics imports it where it finds it, so that `train.py` is slower than "
            "after `make install` alone; the bare script is not."
        )
    return notes
