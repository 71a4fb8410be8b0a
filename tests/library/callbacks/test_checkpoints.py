import gc
import os
import signal
import stat
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from downslope.callbacks import Checkpoints
from downslope.runs.signals import Interrupted
from tests.conftest import Outcome, read_json


class Scripted(LightningModule):
    """A module whose validation losses are given, and whose weight can be spoiled."""

    def __init__(self, losses: list[float], spoiled_from: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.losses = losses
        self.spoiled_from = spoiled_from

    def training_step(self, batch: Tensor) -> Tensor:
        if self.current_epoch == self.spoiled_from:
            self.weight.data.fill_(float("nan"))
        return (self.weight - batch).square().mean()

    def validation_step(self, batch: Tensor) -> None:
        self.log("val/loss", self.losses[self.current_epoch])

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


def fit(folder: Path, module: Scripted, **settings: float) -> None:
    loader = DataLoader(torch.ones(2, 1), batch_size=1)
    Trainer(
        max_epochs=len(module.losses),
        accelerator="cpu",
        logger=False,
        callbacks=[Checkpoints(str(folder), **settings)],
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader, loader)


def epoch_of(file: Path) -> int:
    """The epoch whose end it was saved at: two steps each."""
    return int(torch.load(file, weights_only=True)["global_step"]) // 2 - 1


@pytest.mark.parametrize(
    ("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([1.0, float("nan"), 0.5, float("inf")], 2)]
)
def test_best_has_the_least_validation_loss_and_last_is_the_newest(
    tmp_path: Path, losses: list[float], best: int
) -> None:
    fit(tmp_path, Scripted(losses))
    assert epoch_of(tmp_path / "best.ckpt") == best
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2 * len(losses)


def test_neither_ever_holds_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    fit(tmp_path, Scripted([3.0, 2.0, 1.0, 0.5], spoiled_from=2), every_n_seconds=0.0)
    assert epoch_of(tmp_path / "best.ckpt") == 1
    assert torch.isfinite(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["weight"]).all()


def test_last_is_written_on_the_way(tmp_path: Path) -> None:
    module = Scripted([1.0, 1.0, 1.0])
    seen = []
    module.on_validation_epoch_start = lambda: seen.append((tmp_path / "last.ckpt").exists())
    fit(tmp_path, module, every_n_seconds=0.0)
    assert seen[-1]
    seen.clear()
    (tmp_path / "last.ckpt").unlink()
    fit(tmp_path, module, every_n_seconds=1e9)
    assert not any(seen)
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("max_share", "at_most"), [(0.5, 7), (1.0, 21)])
def test_what_takes_long_to_write_is_written_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_share: float, at_most: int
) -> None:
    flush, writes = os.fsync, []

    def slow(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            writes.append(handle)
            time.sleep(0.2)
        flush(handle)

    class Steady(Scripted):
        def training_step(self, batch: Tensor) -> Tensor:
            time.sleep(0.05)
            return super().training_step(batch)

    monkeypatch.setattr(os, "fsync", slow)
    fit(tmp_path, Steady([float("nan")] * 10), every_n_seconds=0.0, max_share=max_share)
    # 20 steps of 0.05 s: a write of 0.2 s for every 0.2 s, or at every step; and once more at the end.
    assert len(writes) <= at_most
    assert (len(writes) > 7) == (max_share == 1.0)


def test_an_interruption_before_training_begins_is_no_error(tmp_path: Path) -> None:
    class Interrupting(Scripted):
        def prepare_data(self) -> None:
            raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(tmp_path, Interrupting([1.0]))


@pytest.mark.parametrize("max_share", [0.0, -1.0, 2.0, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path: Path, max_share: float) -> None:
    with pytest.raises(ValueError, match="`max_share` must be a number above 0 and at most 1"):
        Checkpoints(str(tmp_path), max_share=max_share)


def test_a_training_that_is_done_leaves_the_signals_as_it_found_them(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit(tmp_path, Scripted([1.0]))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_training_that_is_done_leaves_no_trainer_in_memory(tmp_path: Path) -> None:
    """A sweep of a thousand jobs holds one."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # Lightning's handler calls the one that it finds
    try:
        module = Scripted([1.0])
        fit(tmp_path, module)
        left = weakref.ref(module)
        del module
        gc.collect()
        assert left() is None
    finally:
        signal.signal(signal.SIGTERM, before)


FINDER = ("+callbacks.finder._target_=lightning.pytorch.callbacks.LearningRateFinder", "hydra.run.dir=run")


@pytest.mark.parametrize("task", ["data=diabetes", "experiment=digits"])
def test_the_rate_that_lightnings_finder_sets_is_trained_with_said_and_recorded(
    script: Callable[..., Outcome], tmp_path: Path, task: str
) -> None:
    ended = script("train", *FINDER, task, "+callbacks.finder.num_training_steps=60", "trainer.max_epochs=3")
    assert ended.code == 0, ended.err
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    (group,) = last["optimizer_states"][0]["param_groups"]
    assert read_json(tmp_path / "run")["learning_rate"] == group["lr"] not in (0.02, 0.5)  # those of the configurations
    assert f"LearningRateFinder: lr {group['lr']:g}\n" in ended.out


def test_a_finder_that_finds_nothing_says_so_with_the_way_out(script: Callable[..., Outcome], tmp_path: Path) -> None:
    ended = script("train", *FINDER, "trainer.max_epochs=1")
    (line,) = [line for line in ended.err.splitlines() if "LearningRateFinder" in line]
    assert "found no rate, so lr stays 0.02" in line
    assert "raise `trainer.max_epochs`" in line
    assert read_json(tmp_path / "run")["learning_rate"] == 0.02


def test_a_finder_beside_a_schedule_is_refused(script: Callable[..., Outcome], tmp_path: Path) -> None:
    ended = script("train", *FINDER, "scheduler=cosine")
    assert ended.code == 1
    assert ended.err.startswith("error: Cannot combine `callbacks.finder` with `scheduler=cosine`.")
    assert "scheduler=constant" in ended.err
    assert not (tmp_path / "run").exists()
