"""Which hooks Lightning enters: it opens a profiler for each, and the profiler is asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from downslope.callbacks import FlightRecorder, GradientMonitor, LearningRateEffects, SharpnessMonitor
from downslope.steps.observer import STEP_HOOKS, Observer
from downslope.steps.optimizer_steps import OptimizerSteps
from downslope.steps.unclipped_gradients import may_be_clipped
from downslope.tables.batches import Batches, ShuffledOrder


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.line(batch[0]).squeeze(-1), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.1)


def entered(folder: Path, callback: Callback, **settings: Any) -> dict[str, int]:
    """How often Lightning has entered each of a callback's hooks of a step, in 12 steps."""
    profiler = SimpleProfiler()
    trainer = Trainer(
        max_epochs=3,
        callbacks=[callback],
        profiler=profiler,
        logger=TensorBoardLogger(folder, name="", version=""),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(Line(), Batches(torch.randn(8, 2), torch.randn(8), 2, ShuffledOrder(8, seed=0)))
    assert trainer.global_step == 12
    names = {name: f"[Callback]{callback.state_key}.{name}" for name in STEP_HOOKS}
    durations = profiler.recorded_durations
    return {name: len(durations[key]) for name, key in names.items() if key in durations}


class OneHook(Observer):
    seen = 0

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self.listen_only("on_before_backward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self.seen += 1
        self.listen("on_before_backward", when=self.seen < 5)


def test_lightning_passes_over_what_is_left_out_or_put_to_sleep(tmp_path: Path) -> None:
    assert entered(tmp_path, OneHook()) == {"on_before_backward": 5}


def test_without_it_lightning_enters_all(tmp_path: Path) -> None:
    assert entered(tmp_path, Callback()) == dict.fromkeys(STEP_HOOKS, 12)


@pytest.mark.parametrize(
    ("callback", "settings", "hooks"),
    [
        (GradientMonitor(4, 4), {}, {}),
        (GradientMonitor(4, 4, num_first_steps=0), {"gradient_clip_val": 1.0}, {"on_before_optimizer_step": 3}),
        (LearningRateEffects(4, 4), {}, {"on_train_batch_start": 3, "on_train_batch_end": 3}),
        (LearningRateEffects(1, 4), {}, {"on_train_batch_start": 3, "on_train_batch_end": 3}),
        (LearningRateEffects(4, None), {}, {}),
        (SharpnessMonitor(4), {}, {"on_train_batch_start": 3}),
        (FlightRecorder(), {}, {}),
        (FlightRecorder(every_n_steps=2), {}, {"on_train_batch_start": 12, "on_train_batch_end": 6}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Callback) else None,
)
def test_observers_are_entered_at_the_steps_that_are_due(
    tmp_path: Path, callback: Callback, settings: dict[str, Any], hooks: dict[str, int]
) -> None:
    assert entered(tmp_path, callback, **settings) == hooks


def test_all_observers_share_one_pair_of_hooks() -> None:
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=0.125)
    trainer.strategy.optimizers = [optimizer]
    seen: list[tuple[str, int, float]] = []
    every = OptimizerSteps(
        trainer,
        before=lambda step: seen.append(("before", step.step, weight.item())),
        after=lambda step: seen.append(("after", step.step, weight.item())),
    )
    second = OptimizerSteps(
        trainer, after=lambda step: seen.append(("second", step.step, 0.0)), due=lambda count: count % 2 == 0
    )
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    weight.grad = torch.full((1,), 4.0)
    optimizer.step()
    optimizer.step()
    assert seen == [("before", 0, 1.0), ("after", 0, 0.5), ("second", 0, 0.0), ("before", 1, 0.5), ("after", 1, 0.0)]
    every.detach()
    assert len(optimizer._optimizer_step_post_hooks) == 1
    second.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class Watcher(FlightRecorder):
    """Somebody's subclass that leaves gradients alone."""


class Clipper(Callback):
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        nn.utils.clip_grad_norm_(pl_module.parameters(), 0.1)


@pytest.mark.parametrize(("callbacks", "clipped"), [([], False), ([Watcher()], False), ([Watcher(), Clipper()], True)])
def test_only_a_hook_of_somebody_elses_may_clip(callbacks: list[Callback], clipped: bool) -> None:
    trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu", enable_checkpointing=False)
    assert may_be_clipped(trainer, Line()) is clipped
