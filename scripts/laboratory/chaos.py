"""Kills training at random moments, goes on with it, and compares every bit with a run that was not killed.

python scripts/laboratory/chaos.py [--kills 200] [--seed 0] [--only manual] [--commands 6]
"""

import argparse
import itertools
import os
import random
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from forked import fork, wait
from lightning import LightningModule, Trainer, seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from downslope.callbacks import Checkpoints, FlightRecorder, GradientMonitor, LearningRateEffects, SharpnessMonitor
from downslope.logs.tensorboard import TensorBoard, rewind_event_files
from downslope.runs.checkpoints import load_checkpoint, newest_checkpoint
from downslope.runs.whole_files import PARTIAL

TRAIN = Path(__file__).parents[1] / "train.py"
OBSERVED = [
    *(f"callbacks.{name}.every_n_steps=3" for name in ("gradient_monitor", "learning_rate_effects")),
    "callbacks.learning_rate_effects.descent_ratio_every_n_steps=3",
]
EIGHT_EPOCHS = ["trainer.max_epochs=8", "callbacks.checkpoints.every_n_steps=5", "device=cpu"]
COMMANDS = {
    "automatic": ["optimizer=momentum", *OBSERVED],
    "manual": ["model=manual", "optimizer=adam", *OBSERVED],
    "accumulation": ["+trainer.accumulate_grad_batches=4", *OBSERVED],
    "no observers": ["callbacks=checkpoints", "optimizer=adamw"],
    "no validation": ["+trainer.limit_val_batches=0", *OBSERVED],
    "validation in mid-epoch": ["+trainer.val_check_interval=0.5", *OBSERVED],
    "schedule by epoch": ["scheduler=cosine", *OBSERVED],
    "schedule by step": [
        "scheduler=warmup_cosine",
        "scheduler.scheduler.warmup=0.3",
        "scheduler.interval=step",
        *OBSERVED,
    ],
    "plateau": ["scheduler=plateau", "scheduler.scheduler.patience=0", "lr=0.2", *OBSERVED],
    "manual, schedule by epoch": ["model=manual", "scheduler=step", "scheduler.scheduler.step_size=2", *OBSERVED],
    "manual, schedule by step": ["model=manual", "scheduler=cosine", "scheduler.interval=step"],
    "manual, plateau": ["model=manual", "scheduler=plateau", "scheduler.scheduler.patience=0", "lr=0.2"],
    "one batch an epoch": ["data.batch_size=1000", "trainer.max_epochs=40", *OBSERVED],
    "lbfgs": ["optimizer=lbfgs", "lr=0.1", "data.batch_size=1000", "trainer.max_epochs=30"],
    "clipping": ["+trainer.gradient_clip_val=0.5", "callbacks.checkpoints.every_n_steps=1"],
}
MOMENTS = ("step", "write", "rename", "outside")


@dataclass
class Count:
    """What came of it."""

    killed: int = 0
    resumed: int = 0
    equal: int = 0
    failures: list[str] = field(default_factory=list)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Somebody's data set, which draws random numbers wherever it is loaded."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = torch.sin(torch.arange(4.0) + index)
        return row + 0.1 * torch.randn(4) + random.random(), row.sum()


class Foreign(LightningModule):
    """Somebody's module: dropout, batch norm, a metric of its own, the stock shuffle."""

    def __init__(self, automatic: bool, num_workers: int) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.num_workers = num_workers
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.mean = MeanMetric()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the mean squared error."""
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.mean.update(loss.detach())
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean", self.mean.compute())
        self.mean.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val/loss", nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(Noisy(), batch_size=7, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(), batch_size=20)


def train_command(overrides: list[str]) -> Callable[[Path, bool], None]:
    """Trains as a person does, by scripts/train.py."""

    def train(run: Path, goes_on: bool) -> None:
        where = [f"resume={run}"] if goes_on else [f"hydra.run.dir={run}", *EIGHT_EPOCHS, *overrides]
        sys.argv = [str(TRAIN), *where]
        runpy.run_path(str(TRAIN), run_name="__main__")

    return train


def train_foreign(
    automatic: bool, num_workers: int, observed: bool = True, **settings: Any
) -> Callable[[Path, bool], None]:
    """Trains somebody else's module, under a Trainer of its own."""

    def train(run: Path, goes_on: bool) -> None:
        seed_everything(1, verbose=False)
        file = None
        if goes_on:
            file, checkpoint = newest_checkpoint(run)
            rewind_event_files(run, checkpoint["progress"]["event_files"])
        observers = [
            GradientMonitor(2),
            LearningRateEffects(2, 2),
            SharpnessMonitor(6),
            FlightRecorder(folder=str(run)),
        ]
        Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=TensorBoard(str(run)),
            callbacks=[*(observers if observed else ()), Checkpoints(str(run / "checkpoints"), every_n_steps=4)],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **settings,
        ).fit(Foreign(automatic, num_workers), ckpt_path=file, weights_only=True)

    return train


CASES: dict[str, Callable[[Path, bool], None]] = {
    **{name: train_command(overrides) for name, overrides in COMMANDS.items()},
    "foreign, 0 workers": train_foreign(True, 0),
    "foreign, 2 workers": train_foreign(True, 2),
    "foreign, 2 workers, accumulation": train_foreign(True, 2, accumulate_grad_batches=3),
    "foreign, no observers": train_foreign(True, 0, observed=False),
    "foreign, manual, 0 workers": train_foreign(False, 0),
    "foreign, manual, 2 workers": train_foreign(False, 2),
}


def start(
    run: Path, train: Callable[[Path, bool], None], goes_on: bool, before: Callable[[], None] | None = None
) -> int:
    """Starts a training in a process of its own; returns its number."""

    def act() -> None:
        if before:
            before()
        train(run, goes_on)

    return fork(run.with_suffix(".out"), act)


def die(*_: object) -> NoReturn:
    """Ends this process as a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def after_step(number: int) -> Callable[[], None]:
    """Dies after so many optimizer steps."""
    steps = itertools.count(1)

    def count(*_: object) -> None:
        if next(steps) == number:
            die()

    def plant() -> None:
        register_optimizer_step_post_hook(count)

    return plant


def in_write(number: int, share: float) -> Callable[[], None]:
    """Dies while a checkpoint is being written: part of it is on the disk."""
    writes, flush = itertools.count(1), os.fsync

    def fsync(handle: int) -> None:
        size = os.fstat(handle).st_size
        if stat.S_ISREG(os.fstat(handle).st_mode) and next(writes) == number:
            os.ftruncate(handle, int(size * share)) if share < 1 else flush(handle)
            die()
        flush(handle)

    return lambda: setattr(os, "fsync", fsync)


def at_rename(number: int, after: bool) -> Callable[[], None]:
    """Dies just before or just after a checkpoint takes its name."""
    renames, replace = itertools.count(1), Path.replace

    def dying(self: Path, target: Path) -> Path:
        if self.suffix == PARTIAL and next(renames) == number:
            if after:
                replace(self, target)
            die()
        return replace(self, target)

    return lambda: setattr(Path, "replace", dying)


def kill_once(run: Path, train: Callable[[Path, bool], None], goes_on: bool, rng: random.Random, took: float) -> bool:
    """Starts or goes on with a run, and kills it at a random moment; tells whether it died."""
    moment = rng.choice(MOMENTS)
    if moment == "outside":
        return wait(start(run, train, goes_on), rng.uniform(0.2, 1.0) * took) == -signal.SIGKILL
    plan = {
        "step": lambda: after_step(rng.randint(1, 40)),
        "write": lambda: in_write(rng.randint(2, 10), rng.choice([0.0, 0.3, 0.9, 1.0])),
        "rename": lambda: at_rename(rng.randint(2, 10), rng.random() < 0.5),
    }[moment]()
    return wait(start(run, train, goes_on, plan)) == -signal.SIGKILL


def plain(value: Any) -> Any:
    """A tensor as bits and shape, so that == compares what a checkpoint holds to the last bit."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def differences(run: Path, reference: Path) -> list[str]:
    """What differs between a run's folder and that of the run which was never killed."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        files = [folder / "checkpoints" / name for folder in (run, reference)]
        if not files[1].exists() and not files[0].exists():
            continue
        here, there = (load_checkpoint(file) for file in files)
        for each in (here, there):
            for key in ("seconds", "event_files"):
                each.get("progress", {}).pop(key, None)
            states, progress = each.get("optimizer_states", ()), each.get("progress", {})
            for group in (
                *progress.get("settings", ()),
                *(group for state in states for group in state["param_groups"]),
            ):
                group.setdefault("differentiable", False)  # torch gives it to LBFGS when a state is loaded
        found += [f"{name}: {key}" for key in there if plain(here.get(key)) != plain(there[key])]
    curves = [scalars(folder) for folder in (run, reference)]
    found += [f"curve {tag}" for tag in {**curves[0], **curves[1]} if curves[0].get(tag) != curves[1].get(tag)]
    return found


def scalars(run: Path) -> dict[str, list[tuple[int, str]]]:
    """Every curve, as TensorBoard reads it; as text, because NaN equals nothing."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    curves = {
        tag: [(event.step, repr(event.value)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    for tag in events.Tags()["histograms"]:
        curves[f"histogram {tag}"] = [(event.step, repr(event.histogram_value.sum)) for event in events.Histograms(tag)]
    return curves


def chaos(name: str, num_kills: int, rng: random.Random, folder: Path, count: Count) -> None:
    """Kills one kind of run so many times, each run once, or twice, before it may end."""
    train = CASES[name]
    reference = folder / "reference"
    started = time.monotonic()
    assert wait(start(reference, train, False)) == 0, reference.with_suffix(".out").read_text()
    took = time.monotonic() - started
    done = 0
    for number in itertools.count():
        if done >= num_kills:
            return
        run = folder / f"run{number}"
        goes_on = False
        kills = 0
        for _ in range(rng.choice([1, 1, 2])):
            if kill_once(run, train, goes_on, rng, took):
                kills += 1
            goes_on = True
            try:
                newest_checkpoint(run)
            except ValueError:
                goes_on = False
                shutil.rmtree(run, ignore_errors=True)
        if not kills:
            continue
        done += kills
        count.killed += kills
        if wait(start(run, train, goes_on)) != 0:
            count.failures.append(f"{name}, {run}: did not go on: {run.with_suffix('.out').read_text()[-2000:]}")
            continue
        count.resumed += kills
        different = differences(run, reference)
        if different:
            count.failures.append(f"{name}, {run}: {', '.join(different)}")
        else:
            count.equal += kills
            shutil.rmtree(run)


def kill_command(overrides: list[str], rng: random.Random, folder: Path, count: Count) -> None:
    """The same with a whole command, processes of its own included, killed from outside."""
    command = [sys.executable, str(TRAIN)]

    def start(run: Path, *more: str) -> "subprocess.Popen[bytes]":
        output = run.with_suffix(".out").open("ab")
        return subprocess.Popen([*command, *more], stdout=output, stderr=output, start_new_session=True)

    reference, run = folder / "reference", folder / "killed"
    settings = [*EIGHT_EPOCHS, "trainer.max_epochs=60", *overrides]
    if not reference.exists() and start(reference, f"hydra.run.dir={reference}", *settings).wait():
        raise SystemExit(reference.with_suffix(".out").read_text())
    shutil.rmtree(run, ignore_errors=True)
    process = start(run, f"hydra.run.dir={run}", *settings)
    while not (run / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.5))
    os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return
    count.killed += 1
    if start(run, f"resume={run}").wait():
        count.failures.append(f"command {overrides}: {run.with_suffix('.out').read_text()[-2000:]}")
        return
    count.resumed += 1
    different = differences(run, reference)
    count.equal += not different
    count.failures += [f"command {overrides}: {each}" for each in different]


def main() -> int:
    """Runs the matrix; returns 1 where a run did not go on, or not exactly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--commands", type=int, default=6, help="kills of whole commands, half of them of two processes"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in CASES if arguments.only in name]
    count = Count()
    print(f"seed {arguments.seed}", flush=True)
    root = Path(tempfile.mkdtemp(prefix="downslope-chaos-"))
    for index, name in enumerate(names):
        share = arguments.kills // len(names) + (index < arguments.kills % len(names))
        folder = root / str(index)
        folder.mkdir()
        before = count.killed, count.resumed, count.equal
        chaos(name, share, random.Random(f"{arguments.seed} {name}"), folder, count)
        killed, resumed, equal = (
            now - then for now, then in zip((count.killed, count.resumed, count.equal), before, strict=True)
        )
        print(f"  {name:<34} killed {killed:>3}, resumed {resumed:>3}, bit-equal {equal:>3}", flush=True)
    for index in range(arguments.commands):
        folder = root / f"command{index % 2}"
        folder.mkdir(exist_ok=True)
        kill_command(
            [["optimizer=adam"], ["trainer=ddp"]][index % 2], random.Random(arguments.seed + index), folder, count
        )
    for failure in count.failures:
        print(failure)
    print(f"killed {count.killed}, resumed {count.resumed}, bit-equal {count.equal}")
    if not count.failures:
        shutil.rmtree(root)
    return int(bool(count.failures))


if __name__ == "__main__":
    sys.exit(main())
