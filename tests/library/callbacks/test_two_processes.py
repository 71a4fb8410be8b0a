"""The observers of two processes that share each batch, against one process that has it whole."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from downslope.callbacks import FlightRecorder, GradientMonitor, LearningRateEffects, SharpnessMonitor, VerdictMonitor
from tests.conftest import ROOT, read_events
from tests.library.callbacks.test_every_setting import Manual, ManualClip, Net

pytestmark = pytest.mark.slow

NUM_ROWS, BATCH, BROKEN = 48, 8, 29  # of the fourth batch, and in the second process
EVENTS = "events.out.tfevents.*"


class ManualPairs(Manual):
    """Steps after every second batch; the last window is whole."""

    every = 2


SETTINGS: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "automatic": (Net, {}),
    "automatic, accumulated": (Net, {"accumulate_grad_batches": 2}),
    "automatic, clipped": (Net, {"gradient_clip_val": 0.05}),
    "manual": (Manual, {}),
    "manual, accumulated": (ManualPairs, {}),
    "manual, clipped": (ManualClip, {}),
}


def fit(folder: Path, kind: type[Net], devices: int, observers: list[Any], rows: Tensor, **settings: Any) -> None:
    class Module(kind):  # type: ignore[misc, valid-type]
        def train_dataloader(self) -> DataLoader[Any]:
            """Deals the rows out in turn, so that two halves of a batch are the rows of the whole one."""
            data = TensorDataset(rows, rows.sum(dim=1).sin())
            sampler = DistributedSampler(data, devices, self.global_rank, shuffle=False)
            return DataLoader(data, batch_size=BATCH // devices, sampler=sampler)

        def on_train_end(self) -> None:
            torch.save(self.state_dict(), folder / f"weights{self.global_rank}.pt")

    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true",
        max_epochs=2,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=observers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # which would shuffle
        **settings,
    )
    trainer.fit(Module())


def all_settings(folder: Path, devices: int) -> None:
    rows = torch.randn(NUM_ROWS, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for name, (kind, settings) in SETTINGS.items():
        observers = [
            GradientMonitor(every_n_steps=1, histogram_every_n_steps=1),
            LearningRateEffects(every_n_steps=1),
            SharpnessMonitor(every_n_steps=4),
            FlightRecorder(),
        ]
        fit(folder / name, kind, devices, observers, rows, **settings)
    rows[BROKEN] = nan
    for name in ("automatic", "manual"):
        fit(folder / f"{name}, broken", SETTINGS[name][0], devices, [FlightRecorder()], rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    two = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-W", "ignore", "-m", "tests.library.callbacks.test_two_processes", str(two)]
    pair = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    one = tmp_path_factory.mktemp("one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        all_settings(one, devices=1)
    said, _ = pair.communicate(timeout=120)
    assert pair.returncode == 0, said
    reason = "evaluates a step's loss again: each process knows only the loss of its own share"
    assert said.count(reason) == len(SETTINGS)
    return one, two


Values = dict[str, list[tuple[int, float]]]


def values(folder: Path) -> Values:
    """Every scalar, and of every histogram its sum."""
    events = read_events(folder)
    tags = events.Tags()
    scalars = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars | {
        tag: [(each.step, each.histogram_value.sum) for each in events.Histograms(tag)] for tag in tags["histograms"]
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_write_what_one_writes_of_the_joined_batch(folders: tuple[Path, Path], name: str) -> None:
    one, two = (folder / name for folder in folders)
    assert len(list(two.rglob(EVENTS))) == 1
    expected, found = values(one), values(two)
    # Each process knows the loss of its own share alone, and a manual step over several batches has none anyhow.
    assert (expected.pop("learning_rate_effect/descent_ratio", None) is None) == (name == "manual, accumulated")
    assert set(found) == set(expected)
    assert {"gradient_norm/first.weight", "gradient/first.weight", "curvature/sharpness"} < set(expected)
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        assert [value for _, value in found[tag]] == pytest.approx(
            [value for _, value in points],
            rel=1e-6,  # events are float32; the sums were float64
            abs=1e-9,
        ), tag
    weights = [torch.load(each, weights_only=True) for each in (*one.glob("*.pt"), *two.glob("*.pt"))]
    for each in weights[1:]:
        torch.testing.assert_close(each, weights[0])


@pytest.mark.parametrize("mode", ["automatic", "manual"])
def test_two_processes_stop_together_where_one_has_a_broken_row(folders: tuple[Path, Path], mode: str) -> None:
    one, two = (folder / f"{mode}, broken" for folder in folders)
    record = json.loads((two / "flight_record.json").read_text())
    assert (record["step"], record["reason"]) == (BROKEN // BATCH, "loss")
    assert record["batch"][0]["rows"][BROKEN % BATCH // 2] == ["nan"] * 3  # the process's own half of the batch
    weights = [torch.load(each, weights_only=True) for each in (*one.glob("*.pt"), *two.glob("*.pt"))]
    assert len(weights) == 3
    for each in weights[1:]:
        torch.testing.assert_close(each, weights[0])
    assert all(bool(torch.isfinite(value).all()) for value in weights[0].values())


def with_and_without_observers(folder: Path, strategy: str) -> None:
    states = []
    for observers in ([], [GradientMonitor(1), LearningRateEffects(1), VerdictMonitor(3, 3), FlightRecorder()]):
        seed_everything(0, verbose=False)
        module = Net()
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=2,
            default_root_dir=folder,
            logger=TensorBoardLogger(folder, name="", version=""),
            callbacks=observers,  # type: ignore[arg-type]
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        rows = torch.randn(NUM_ROWS, 3, generator=torch.Generator().manual_seed(3))
        trainer.fit(module, DataLoader(TensorDataset(rows, rows.sum(dim=1).sin()), batch_size=BATCH))
        states.append(module.state_dict())
        pickle.dumps(observers)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_that_are_spawned_or_forked_train_to_the_same_bits_and_are_watched(
    tmp_path: Path, strategy: str
) -> None:
    # In a process of its own: one that forks must not have the threads of the tests before.
    call = f"{with_and_without_observers.__name__}(Path({str(tmp_path)!r}), {strategy!r})"
    code = f"from pathlib import Path; from {__name__} import *; {call}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ended.returncode == 0, ended.stderr
    assert "gradient_norm/total" in values(tmp_path)
    assert "Verdict: " in ended.stdout  # by the first process: it does not come back from there


if __name__ == "__main__":
    all_settings(Path(sys.argv[1]), devices=2)
