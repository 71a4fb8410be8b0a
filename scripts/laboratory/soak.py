"""Many runs in one process, and one long run: does memory, do files, threads or events pile up? Exit code 1 if so."""

import argparse
import contextlib
import io
import os
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

SCRIPTS = Path(__file__).parents[1]
NUM_SAMPLES = 20
# What may be allocated late: an allocator's arenas, a cache that fills up to its bound.
SPARE_BYTES = 32 * 2**20
# What the default observers write grows with the steps; what waits in memory, and a picture, comes all at once.
MOST_EVENT_BYTES, SPARE_EVENT_BYTES = 30, 2**20


@dataclass(frozen=True)
class Sample:
    """What a process holds, after so many runs or steps."""

    count: int
    memory: int
    files: int
    threads: int
    event_bytes: int

    @classmethod
    def take(cls, count: int, run: Path) -> "Sample":
        """Looks at this process, and at the event files of a run."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        events = sum(file.stat().st_size for file in run.rglob("events.out.tfevents.*"))
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (the listing itself is one of them, always)
        return cls(count, pages * os.sysconf("SC_PAGE_SIZE"), files, threading.active_count(), events)


class Probe(Callback):
    """Takes a sample every so many optimizer steps."""

    samples: list[Sample] = []  # noqa: RUF012  (Hydra makes the object; this is where it is found again)

    def __init__(self, run: str, every_n_steps: int) -> None:
        self.run, self.every_n_steps = Path(run), every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.samples.append(Sample.take(trainer.global_step, self.run))
            show(self.samples[-1])


def many_runs(number: int) -> list[Sample]:
    """Trains again and again in this process, each time as the command does."""
    samples = []
    for count in range(1, number + 1):
        with tempfile.TemporaryDirectory() as folder:
            train(f"hydra.run.dir={folder}/run", f"seed={count}", "trainer.max_epochs=2")
            if count % max(1, number // NUM_SAMPLES) == 0:
                samples.append(Sample.take(count, Path(folder)))
                show(samples[-1])
    return samples


def long_run(num_steps: int) -> list[Sample]:
    """Trains once, for long, with the default observers, a thousand steps an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        every = max(1, num_steps // NUM_SAMPLES)
        train(
            *(f"hydra.run.dir={folder}/run", "data=synthetic", "data.num_rows=10000", "data.batch_size=8"),
            *("trainer.max_epochs=-1", f"+trainer.max_steps={num_steps}", "+callbacks.probe._target_=soak.Probe"),
            *(f"+callbacks.probe.run={folder}/run", f"+callbacks.probe.every_n_steps={every}"),
        )
    return list(sys.modules["soak"].Probe.samples)


def train(*overrides: str) -> None:
    """Runs `scripts/train.py` inside this process, in silence."""
    from hydra.core.global_hydra import GlobalHydra

    sys.argv[:] = ["train.py", *overrides]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(SCRIPTS / "train.py"), run_name="__main__")
    except SystemExit as leave:
        raise RuntimeError(f"A run ended with exit code {leave.code}: {said.getvalue()}") from None
    finally:
        GlobalHydra.instance().clear()


def growth(samples: Sequence[Sample]) -> Iterator[str]:
    """Yields what has grown since a quarter of the way, when all caches are warm."""
    first, last = samples[(len(samples) - 1) // 4], samples[-1]
    if last.memory > first.memory + SPARE_BYTES:
        yield f"memory grew by {(last.memory - first.memory) / 2**20:.1f} MiB from {first.count:,} to {last.count:,}"
    if last.files > first.files:
        yield f"open files grew from {first.files} to {last.files}"
    if last.threads > first.threads:
        yield f"threads grew from {first.threads} to {last.threads}"
    num, written = last.count - first.count, last.event_bytes - first.event_bytes
    if written > MOST_EVENT_BYTES * num + SPARE_EVENT_BYTES:
        yield f"events grew by {written / num:.0f} bytes for each of {num:,}, more than {MOST_EVENT_BYTES}"


def show(sample: Sample) -> None:
    """Prints a row of the table."""
    print(
        f"  {sample.count:>11,}  {sample.memory / 2**20:>9.1f}  {sample.files:>5}  {sample.threads:>7}"
        f"  {sample.event_bytes / 2**20:>10.2f}  {time.perf_counter() - STARTED:>7.0f}",
        file=sys.__stdout__,
        flush=True,
    )


STARTED = time.perf_counter()


def main(arguments: Sequence[str]) -> int:
    """Soaks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="runs in this process (%(default)s)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the long run (%(default)s)")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(SCRIPTS))
    grown = []
    for what, soak, number in (("runs", many_runs, options.runs), ("steps", long_run, options.steps)):
        print(f"  {what:>11}  {'RSS, MiB':>9}  {'files':>5}  {'threads':>7}  {'events, MiB':>10}  {'seconds':>7}")
        grown += list(growth(soak(number))) if number else []
    print("\n".join(grown) or "flat: neither memory nor open files, threads or events pile up")
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
