"""What other packages from the index say of the same runs: training-doctor, sk-autod and thermoclaw.

They are no part of the project's environment: pip install --no-deps --target FOLDER training-doctor==0.1.0
sk-autod==0.1.1 thermoclaw==0.1.6, and PYTHONPATH=FOLDER.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer

from benchmarks.matrix import Run, Truth, runs_of
from benchmarks.networks import NUM_STEPS, TASKS, Courses, Part, network, train
from benchmarks.report import print_report, show_progress
from downslope.verdict import judge

Said = Literal["nothing", "too high", "too low", "both", "another alarm"]

RIGHT: dict[Truth, Said] = {"sound": "nothing", "too slow": "too low", "too large": "too high"}
UNSTABLE = ("diverging", "too_large", "non_finite")


def rivals(part: Part, file: Path) -> None:
    """Prints how often each is right about the networks of `benchmarks.matrix`.

    Args:
        part: Which tasks.
        file: Where their courses are kept.
    """
    torch.set_num_threads(1)
    others: dict[str, Callable[[Run], Said]] = {
        "training-doctor": _training_doctor,
        "sk-autod": _sk_autod,
        "thermoclaw": _thermoclaw,
    }
    judges = {"this verdict": _verdict} | {
        name: said for name, said in others.items() if find_spec(name.replace("-", "_"))
    }
    counts: dict[tuple[str, Truth], Counter[Said]] = defaultdict(Counter)
    for run in runs_of(Courses(file), part):
        show_progress(f"{run.name}, {run.method}, lr={run.rate:.3g}")
        for name in judges:
            if run.truth:
                counts[name, run.truth][judges[name](run)] += 1
    show_progress("")
    rows = []
    for name in judges:
        cells = []
        for truth, right in RIGHT.items():
            said = counts[name, truth]
            wrong = ", ".join(f"{count} {what}" for what, count in said.most_common() if what != right)
            cells.append(f"{said[right]}/{said.total()}" + (f" ({wrong})" if wrong else ""))
        rows.append([name, *cells])
    missing = [f"{name} is not installed." for name in others if name not in judges]
    print_report(["", *(f"{truth}: says {right}" for truth, right in RIGHT.items())], rows, missing)


def _verdict(run: Run) -> Said:
    verdict = judge(run.course.seen[-1])
    if verdict.word in UNSTABLE:
        return "too high"
    if verdict.word == "too_slow":
        return "too low"
    return "nothing" if verdict.word in ("converging", "converged") and not verdict.hints else "another alarm"


def _summary(alarms: Iterable[str]) -> Said:
    alarms = [alarm.lower() for alarm in alarms]
    high = any("too high" in alarm or "exploding" in alarm for alarm in alarms)
    low = any("too low" in alarm for alarm in alarms)
    if high or low:
        return "both" if high and low else "too high" if high else "too low"
    return "another alarm" if alarms else "nothing"


def _training_doctor(run: Run) -> Said:
    """Every step's loss, as its callback for Lightning logs it, and the rate."""
    doctor = import_module("training_doctor").Doctor()
    for step, loss in enumerate(run.course.losses):
        doctor.log(step, loss=loss, lr=run.rate)
    return _summary(each.problem for each in doctor.diagnoses)


def _sk_autod(run: Run) -> Said:
    """The means of at least five epochs, as those of validation too, which it asks for; it takes finite ones only."""
    task = TASKS[run.name]
    num_steps = max(1, min(len(task.data()[0]) // task.batch_size, len(run.course.losses) // 5))
    losses = run.course.losses
    epochs = [fmean(losses[start : start + num_steps]) for start in range(0, len(losses), num_steps)]
    epochs = [epoch for epoch in epochs if math.isfinite(epoch)]
    if len(epochs) < 5:
        return "nothing"
    return _summary(each.detector_name for each in import_module("sk_autod").diagnose(epochs, epochs).findings)


def _thermoclaw(run: Run) -> Said:
    """Trained again beside it, since it looks at each step's gradient."""
    task, watched = TASKS[run.name], _Watched()
    train(
        network(run.name, run.method, run.rate), task.data(), task.batch_size, NUM_STEPS, observe=False, more=[watched]
    )
    return _summary(import_module("thermoclaw").diagnose(watched.observer).recommendations)


class _Watched(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.observer: Any = import_module("thermoclaw").Observer(pl_module, trainer.optimizers[0])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.observer.step()
