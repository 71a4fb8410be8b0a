"""What can be proved on a GPU alone, in five minutes: make gpu. It prints a table; any failure is exit code 1.

Each check runs the scripts as a person does, or a Trainer of its own beside an independent recorder. `--device cpu`
runs the same checks on a machine without a GPU, where they prove the script and nothing of a GPU.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.large_models import Layers, fit, gpt2, layers, observers
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from tqdm import tqdm

from downslope.callbacks import FlightRecorder, GradientMonitor, LearningRateEffects
from downslope.logs.tensorboard import TensorBoard

ROOT = Path(__file__).parents[2]
LAST = "checkpoints/last.ckpt"
FLOAT32 = 1e-4  # other sums, in another order
LONGEST = 120  # seconds, of a process
AT_ONCE = max(1, (os.cpu_count() or 1) // 2)  # processes: most of what they do is to start


@dataclass
class Place:
    """Where the checks run.

    Attributes:
        device: gpu or cpu.
        folder: For their runs.
    """

    device: str
    folder: Path

    @property
    def torch_device(self) -> str:
        """As torch names it."""
        return "cuda" if self.device == "gpu" else self.device

    def train(self, name: str, *overrides: str, device: str | None = None, expected: int = 0) -> Path:
        """Trains by the script, in a folder of this name, which is returned."""
        command = self.command(name, *overrides, device=device)
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
        assert ended.returncode == expected, f"{name}: exit code {ended.returncode}: {ended.stderr[-500:]}"
        return self.folder / name

    def command(self, name: str, *overrides: str, device: str | None = None) -> list[str]:
        """Returns the script's command."""
        given = [f"device={device or self.device}", f"hydra.run.dir={self.folder / name}"]
        return [sys.executable, "scripts/train.py", *given, *overrides]


def weights(run: Path) -> dict[str, Tensor]:
    """Returns a run's last weights."""
    state: dict[str, Tensor] = torch.load(run / LAST, weights_only=True, map_location="cpu")["state_dict"]
    return state


def same(one: Path, other: Path) -> bool:
    """Tells whether two runs end in the same bits."""
    here, there = weights(one), weights(other)
    return here.keys() == there.keys() and all(torch.equal(value, there[name]) for name, value in here.items())


def trains(place: Place) -> str:
    """Each model in each precision, on the device that was asked for."""
    models = {"automatic": [], "manual": ["model=manual"], "digits": ["experiment=digits", "trainer.max_epochs=8"]}
    precisions = ["32-true", "bf16-mixed", *(["16-mixed"] if place.device == "gpu" else [])]  # else there is no scaler
    pairs = [*itertools.product(models, precisions)]

    def train(model: str, precision: str) -> Path:
        return place.train(f"{model}_{precision}", *models[model], f"+trainer.precision={precision}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = [*pool.map(lambda pair: train(*pair), pairs)]
    for (model, _), run in zip(pairs, runs, strict=True):
        result = json.loads((run / "result.json").read_text())
        assert result["status"] == "completed", result
        assert result["device"].startswith(place.torch_device), result["device"]
        if model == "digits":
            assert result["metrics"]["test/accuracy"] > 0.9, result["metrics"]
    automatic = json.loads((place.train("auto", device="auto") / "result.json").read_text())
    return f"3 models × {len(precisions)} precisions completed; device=auto took {automatic['device']}"


def repeats(place: Place) -> str:
    """The same command twice, automatic and manual, and with no observer."""
    tasks = {"sgd": [], "adam": ["optimizer=adam"], "digits": ["experiment=digits", "trainer.max_epochs=5"]}
    runs = {
        f"{again}_{name}": [*chosen, *(["callbacks=checkpoints"] if again == "bare" else [])]
        for (name, chosen), again in itertools.product(tasks.items(), ("first", "second", "bare"))
    }
    with ThreadPoolExecutor(AT_ONCE) as pool:
        [*pool.map(lambda name: place.train(name, *runs[name]), runs)]
    for name in tasks:
        first, second, bare = (place.folder / f"{again}_{name}" for again in ("first", "second", "bare"))
        assert same(first, second), f"{name}: another end the second time"
        assert same(first, bare), f"{name}: observers changed it"
    assert same(place.folder / "first_sgd", place.train("by_hand", "model=manual")), "manual is not automatic"
    return "the same bits twice, with and without observers, automatic and manual"


def resumes(place: Place) -> str:
    """Killed in mid-run, and resumed to the bits of a run that was not."""
    often = ["experiment=digits", "trainer.max_epochs=40", "callbacks.checkpoints.every_n_steps=20"]
    whole, killed = place.train("whole", *often), place.folder / "killed"
    with subprocess.Popen(place.command("killed", *often), cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not (killed / LAST).exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, f"it ended before it was killed: {process.returncode}"
    step = torch.load(killed / LAST, weights_only=True, map_location="cpu")["global_step"]
    command = [sys.executable, "scripts/train.py", f"resume={killed}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    assert ended.returncode == 0, ended.stderr[-500:]
    assert same(whole, killed), "the resumed run ends in other bits"
    return f"SIGKILL at step {step}, resumed to the same bits"


def sweeps(place: Place) -> str:
    """A sweep over both devices: the same training, but for the order of sums."""
    sweep = place.folder / "sweep"
    devices = f"device=cpu,{place.device}" if place.device != "cpu" else "device=cpu"
    command = [sys.executable, "scripts/train.py", "-m", devices, "lr=0.01,0.1", f"hydra.sweep.dir={sweep}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
    assert ended.returncode == 0, ended.stderr[-500:]
    worst = 0.0
    for rate in ("0.01", "0.1"):
        here, there = (weights(sweep / f"device={device},lr={rate}") for device in ("cpu", place.device))
        worst = max(
            worst, *(float((here[name] - value).abs().max() / value.abs().max()) for name, value in there.items())
        )
    assert worst < FLOAT32, f"the devices differ by {worst:.1e}"
    return f"4 jobs completed; the devices' weights differ by {worst:.1e}"


def many_at_once(place: Place) -> str:
    """The vectorised launcher, against one of its jobs alone."""
    sweep = place.folder / "many"
    rates = ",".join(f"{0.001 * 1.05**power:.6f}" for power in range(100))
    command = [sys.executable, "scripts/train.py", "-m", "hydra/launcher=vectorized", f"device={place.device}"]
    start = time.perf_counter()
    ended = subprocess.run(
        [*command, f"lr={rates}", f"hydra.sweep.dir={sweep}"], cwd=ROOT, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    assert ended.returncode == 0, ended.stderr[-500:]
    rate = rates.split(",")[60]
    alone, (member,) = weights(place.train("alone", f"lr={rate}")), sweep.glob(f"*lr={float(rate):g}*")
    together = weights(member)
    worst = max(float((alone[name] - value).abs().max() / value.abs().max()) for name, value in together.items())
    assert worst < FLOAT32, f"a member differs from its run by {worst:.1e}"
    return f"100 rates in {seconds:.0f} s; a member differs from its run by {worst:.1e}"


def diverges(place: Place) -> str:
    """A run that blows up says so; a batch that is not finite is taken back to the bit, or ends the run a step late."""
    run = place.train("diverges", "experiment=diverge", expected=3)
    word = json.loads((run / "result.json").read_text())["verdict"]
    assert word in ("diverging", "too_large", "non_finite"), word
    batches = [*torch.randn(10, 32, 64)]
    before = fit(place.device, lambda: Layers(3, 64), batches[:6])
    batches[6] = batches[6] * float("inf")
    for mode in ("exact", "block"):
        recorder = FlightRecorder(folder=str(place.folder), mode=mode)
        taken_back = fit(place.device, lambda: Layers(3, 64), batches, recorder)
        same = map(torch.equal, before.parameters(), taken_back.parameters())
        assert all(same), f"{mode}: not the weights before the step"
    late = FlightRecorder(folder=str(place.folder), mode="late")
    steps = fit(place.device, lambda: Layers(3, 64), batches, late).trainer.global_step
    assert late.diverged, "late: it was not seen"
    assert steps <= 8, f"late: ended after {steps} steps only"
    return f"{word}; exact and block: the weights of step 6 to the bit; late: ended after {steps} of 10 steps"


class Recorder(Callback):
    """What our observers measure, in float64 on the CPU: nothing of ours."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._gradient: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._before = _vector(pl_module.parameters())
        self._last, self._gradient = self._gradient, _vector(each.grad for each in pl_module.parameters())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        gradient, step = self._gradient, _vector(pl_module.parameters()) - self._before
        assert gradient is not None
        row = {
            "gradient_norm/total": gradient.norm(),
            "update_ratio/total": step.norm() / self._before.norm(),
            "learning_rate_effect/effective": step.norm() / gradient.norm(),
        }
        if self._last is not None:
            row["learning_rate_effect/gradient_cosine"] = torch.cosine_similarity(gradient, self._last, dim=0)
        self.rows.append({tag: float(value) for tag, value in row.items()})


def _vector(tensors: Any) -> Tensor:
    return torch.cat([each.detach().flatten().cpu().double() for each in tensors])


def figures(place: Place) -> str:
    """Figures of every step against an independent recorder in float64; the weights with all observers and without."""
    batches, worst = [*torch.randn(20, 64, 512)], 0.0
    for num_layers in (2, 6):  # half a million elements, which wait to be worked on, and more than a million
        recorder, folder = Recorder(), place.folder / f"figures{num_layers}"
        measured = [GradientMonitor(every_n_steps=1), LearningRateEffects(every_n_steps=1)]
        logger = CSVLogger(folder, name="", version="")
        network = lambda: Layers(num_layers, 512)  # noqa: B023, E731
        fit(place.device, network, batches, *measured, recorder, logger=logger, log_every_n_steps=1)
        lines = (folder / "metrics.csv").read_text().splitlines()
        header = lines[0].split(",")
        logged = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
        logged = [row for row in logged if row["gradient_norm/total"]]
        for row, expected in zip(logged, recorder.rows, strict=True):
            worst = max(
                worst, *(abs(float(row[tag]) - value) / max(abs(value), 0.01) for tag, value in expected.items())
            )
        assert worst < FLOAT32, f"a figure is off by {worst:.1e}"
        bare = fit(place.device, network, batches)
        watched = fit(place.device, network, batches, *observers(place.folder, 1).values())
        assert all(map(torch.equal, watched.parameters(), bare.parameters())), "observers changed it"
    return f"norms, ratios, rates, cosines of 2 × 20 steps within {worst:.1e}; the same bits without observers"


class Waits(Callback):
    """Where the device is waited for within a stretch of steps in which nothing has to be."""

    def __init__(self) -> None:
        self.places: set[str] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available() and batch_idx in (55, 85):  # between two judgements, after the first steps' looks
            torch.cuda.set_sync_debug_mode("warn" if batch_idx == 55 else "default")

    def listen(self, message: Warning | str, *_: Any) -> None:
        """Takes the place of what shows warnings."""
        if "synchronizing" in str(message):
            ours = [each for each in traceback.extract_stack() if str(Path("src/downslope")) in each.filename]
            self.places.update(f"{Path(each.filename).name}:{each.lineno}" for each in ours[-1:])


def waits(place: Place) -> str:
    """Steps that are measured, and those that are not, wait for nothing."""
    for every in (1, 50):
        listener = Waits()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = listener.listen  # type: ignore[assignment]
            known = observers(place.folder, every)
            known["FlightRecorder"] = FlightRecorder(folder=str(place.folder), mode="late")
            logger = TensorBoard(str(place.folder / f"waits{every}"))
            fit(
                place.device,
                lambda: Layers(6, 512),
                [torch.randn(64, 512)] * 90,
                *known.values(),
                listener,
                logger=logger,
            )
        assert not listener.places, f"every {every}: {', '.join(sorted(listener.places))}"
    return "no synchronisation of ours in 30 steps, all measured, or none" if torch.cuda.is_available() else "not asked"


SCRIPTS = {check.__name__: check for check in (trains, repeats, resumes, sweeps, many_at_once)}  # side by side
OWN = {check.__name__: check for check in (diverges, figures, waits)}
COSTS = {model.__name__: model for model in (layers, gpt2)}


def checks(place: Place, only: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """Runs each check: its title, what it says or why it failed, whether it held."""

    def attempt(check: Callable[[Place], str]) -> tuple[str, str, bool]:
        title = " ".join((check.__doc__ or "").split()).rstrip(".")
        try:
            return title, check(place), True
        except Exception as error:
            return title, f"**failed**: {error!r}", False

    scripts, own = ([check for name, check in known.items() if name in only] for known in (SCRIPTS, OWN))
    with ThreadPoolExecutor(len(SCRIPTS) if place.device == "gpu" else 1) as pool:
        progress = tqdm(total=len(scripts) + len(own), desc=place.device)
        for row in itertools.chain(pool.map(attempt, scripts), map(attempt, own)):
            progress.update()
            yield row


def main() -> int:
    """Prints the tables; returns 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    known = (*SCRIPTS, *OWN, *COSTS)
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    arguments = parser.parse_args()
    if arguments.device == "gpu" and not torch.cuda.is_available():
        print("error: there is no GPU here that torch can use; --device cpu tries the script itself.", file=sys.stderr)
        return 1
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products
    name = torch.cuda.get_device_name() if arguments.device == "gpu" else "CPU"
    start, held = time.perf_counter(), True
    with tempfile.TemporaryDirectory() as folder:
        print(f"\n| on {name}, torch {torch.__version__} | |\n|---|---|")
        for title, words, holds in checks(Place(arguments.device, Path(folder)), arguments.only):
            print(f"| {title} | {words} |", flush=True)
            held = held and holds
        for model in (COSTS[each] for each in COSTS if each in arguments.only):
            title = (model.__doc__ or "").rstrip(".")
            print(f"\n| {title} | first 100 steps | later | held | at most |\n|---|---|---|---|---|")
            print(*model(arguments.device, Path(folder)), sep="\n", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s: `python {' '.join(['scripts/laboratory/gpu.py', *sys.argv[1:]])}`")
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
