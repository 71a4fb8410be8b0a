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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from downslope.callbacks import (
    CriticalLearningRate,
    FlightRecorder,
    GradientMonitor,
    LearningRateEffects,
    VerdictMonitor,
)

ROOT = Path(__file__).parents[2]
LAST = "checkpoints/last.ckpt"
FLOAT32 = 1e-4  # other sums, in another order


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
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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
    for (model, chosen), precision in itertools.product(models.items(), ("32-true", "16-mixed", "bf16-mixed")):
        if place.device == "cpu" and precision == "16-mixed":
            continue  # there is no scaler there
        run = place.train(f"{model}_{precision}", *chosen, f"+trainer.precision={precision}")
        result = json.loads((run / "result.json").read_text())
        assert result["status"] == "completed", result
        assert result["device"].startswith(place.torch_device), result["device"]
        if model == "digits":
            assert result["metrics"]["test/accuracy"] > 0.9, result["metrics"]
    automatic = json.loads((place.train("auto", device="auto") / "result.json").read_text())
    return f"3 models × 3 precisions completed; device=auto took {automatic['device']}"


def repeats(place: Place) -> str:
    """The same command twice, automatic and manual, and with no observer."""
    for chosen in ([], ["optimizer=adam"], ["experiment=digits", "trainer.max_epochs=5"]):
        name = "_".join(chosen).replace("=", "-") or "sgd"
        first = place.train(f"first_{name}", *chosen)
        assert same(first, place.train(f"second_{name}", *chosen)), f"{name}: another end the second time"
        assert same(first, place.train(f"bare_{name}", *chosen, "callbacks=checkpoints")), (
            f"{name}: observers changed it"
        )
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
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-500:]
    assert same(whole, killed), "the resumed run ends in other bits"
    return f"SIGKILL at step {step}, resumed to the same bits"


def sweeps(place: Place) -> str:
    """A sweep over both devices: the same training, but for the order of sums."""
    sweep = place.folder / "sweep"
    devices = f"device=cpu,{place.device}" if place.device != "cpu" else "device=cpu"
    command = [sys.executable, "scripts/train.py", "-m", devices, "lr=0.01,0.1", f"hydra.sweep.dir={sweep}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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


class Layers(LightningModule):
    """Layers of one width under a mean squared error, or a transformer of GPT-2's size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, batch: Tensor) -> Tensor:
        """Returns the mean square of what comes out."""
        loss: Tensor = self.network(batch).float().square().mean()
        return loss

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Recorder(Callback):
    """Gradient norms in float64 on the CPU, parameter by parameter: nothing of ours."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        squares = [gradient.cpu().double().square().sum() for gradient in gradients]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


class Clock(Callback):
    """The seconds of each step after the first, the device waited for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        _wait()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self._start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fit(
    place: Place,
    network: Callable[[], nn.Module],
    shape: Sequence[int],
    steps: int,
    *callbacks: Callback,
    **settings: Any,
) -> LightningModule:
    """Trains a network on fixed random batches."""
    seed_everything(0, verbose=False)
    rows: Any = torch.randn(steps, *shape)  # a tensor is a dataset of its rows
    batches: DataLoader[Tensor] = DataLoader(rows, batch_size=None)
    module = Layers(network())
    trainer = Trainer(
        max_epochs=1, accelerator=place.device, devices=1, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **{"logger": False, **settings},
    )  # fmt: skip
    trainer.fit(module, batches)
    return module


def mlp() -> nn.Module:
    """Returns 20 tensors: ten layers of 1024 units."""
    return nn.Sequential(*itertools.chain(*((nn.Linear(1024, 1024), nn.Tanh()) for _ in range(10))))


def gpt2() -> nn.Module:
    """Returns a transformer of GPT-2's size, 12 layers of 768 units, without its table of words: 85 million."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


def figures(place: Place) -> str:
    """The gradient norm of every step against an independent recorder; the weights with and without."""
    recorder, folder = Recorder(), place.folder / "figures"
    logger = CSVLogger(folder, name="", version="")
    watched = fit(
        place, mlp, (64, 1024), 20, GradientMonitor(every_n_steps=1), recorder, logger=logger, log_every_n_steps=1
    )
    bare = fit(place, mlp, (64, 1024), 20)
    assert all(torch.equal(*pair) for pair in zip(watched.parameters(), bare.parameters(), strict=True))
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("gradient_norm/total")
    logged = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    worst = max(abs(one / other - 1) for one, other in zip(logged, recorder.norms, strict=True))
    assert worst < FLOAT32, f"a gradient norm is off by {worst:.1e}"
    return f"20 gradient norms within {worst:.1e} of float64's; the same bits without observers"


def observers(folder: Path, every_n_steps: int) -> list[Callback]:
    """Returns the default observers."""
    return [
        GradientMonitor(every_n_steps=every_n_steps),
        LearningRateEffects(every_n_steps=every_n_steps),
        CriticalLearningRate(),
        FlightRecorder(folder=str(folder)),
        VerdictMonitor(),
    ]


def cost(place: Place, network: Callable[[], nn.Module], shape: Sequence[int], **settings: Any) -> str:
    """Time added to a step, by the clock, in turn; and the most memory held beside the bare run's."""
    steps, kinds = (110, (None, 50, 1)) if place.device == "gpu" else (6, (None, 1))
    seconds: dict[int | None, list[float]] = {kind: [] for kind in kinds}
    memory: dict[int | None, int] = {}
    for _, kind in itertools.product(range(2), kinds):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        clock, watching = Clock(), observers(place.folder, kind) if kind else []
        fit(place, network, shape, steps, *watching, clock, **settings)
        seconds[kind] += clock.seconds[len(clock.seconds) // 10 :]
        memory[kind] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    size = sum(parameter.nbytes for parameter in network().parameters())
    bare = sum(seconds[None]) / len(seconds[None])
    words = [f"step {1000 * median(seconds[None]):.2f} ms"]
    for kind in kinds[1:]:
        more, held = sum(seconds[kind]) / len(seconds[kind]) / bare - 1, (memory[kind] - memory[None]) / size
        words.append(f"every {kind}: {more:+.0%}, {held:.1f} P")
    return "; ".join(words)


def small_network(place: Place) -> str:
    """What observing costs a network of ten layers of 1024 units, batch 1024."""
    return cost(place, mlp, (1024, 1024))


def large_network(place: Place) -> str:
    """What observing costs a transformer of GPT-2's size in bf16, 8 × 512."""
    return cost(place, gpt2, (8, 512, 768), precision="bf16-mixed")


def checks(place: Place) -> Iterator[tuple[Callable[[Place], str], str, bool]]:
    """Runs each check: what it says, or why it failed."""
    known = [trains, repeats, resumes, sweeps, many_at_once, figures, small_network]
    for check in tqdm([*known, *([large_network] if place.device == "gpu" else [])], desc=place.device):
        try:
            yield check, check(place), True
        except Exception as error:
            yield check, f"**failed**: {error}", False


def main() -> int:
    """Prints the table; returns 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    arguments = parser.parse_args()
    if arguments.device == "gpu" and not torch.cuda.is_available():
        print("error: there is no GPU here that torch can use; --device cpu tries the script itself.", file=sys.stderr)
        return 1
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(checks(Place(arguments.device, Path(folder))))
    name = torch.cuda.get_device_name() if arguments.device == "gpu" else "CPU"
    print(f"\n| on {name}, torch {torch.__version__} | |\n|---|---|")
    for check, words, _ in rows:
        print(f"| {' '.join((check.__doc__ or '').split()).rstrip('.')} | {words} |")
    print(f"\n{time.perf_counter() - start:.0f} s: `python scripts/laboratory/gpu.py --device {arguments.device}`")
    return int(not all(succeeded for *_, succeeded in rows))


if __name__ == "__main__":
    sys.exit(main())
