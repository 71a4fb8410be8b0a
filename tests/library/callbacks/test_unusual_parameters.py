"""What needs the loss again, of parameters that are complex, frozen for a while, or that no optimizer has a rate for.

Every loss here is a parabola, so that each figure has a closed form.
"""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from downslope.callbacks import CriticalLearningRate, LearningRateEffects, Pictures, SharpnessMonitor
from downslope.steps import check
from downslope.steps.batch_step import BatchStep
from downslope.steps.loss import BatchLoss

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
RATE = 0.1
NUM_STEPS = 4


class Parabola(LightningModule):
    """L = s² + |w|², whatever the batch: g = 2(s, w), λ = 2, and a step of η multiplies both by 1 − 2η."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([1.5]))  # one number, so that the complex ones begin at an odd place
        self.weight = nn.Parameter(torch.tensor([1 + 2j, 0.5j]))

    def loss(self, batch: Any) -> Tensor:
        return self.shift.square().sum() + (self.weight * self.weight.conj()).real.sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=RATE)


class Valley(Parabola):
    """L = a² + 3b², b frozen for the first two steps: λ is 2, and then 6."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.other = nn.Parameter(torch.tensor([1.0]), requires_grad=False)

    def loss(self, batch: Any) -> Tensor:
        return self.weight.square().sum() + 3 * self.other.square().sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.other.requires_grad_(batch_idx >= 1)


class FindsItsRate(SGD):
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        with torch.no_grad():
            for each in self.param_groups[0]["params"]:
                each -= RATE * each.grad
        return loss


class Rateless(Parabola):
    def configure_optimizers(self) -> Any:
        optimizer = FindsItsRate(self.parameters(), lr=RATE)
        optimizer.param_groups[0]["lr"] = None
        return optimizer


class Untrained(Parabola):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


def curves(folder: Path, module: LightningModule) -> dict[str, dict[int, float]]:
    callbacks: list[Callback] = [
        LearningRateEffects(1, 1),
        CriticalLearningRate(range(NUM_STEPS)),
        SharpnessMonitor(1),
        Pictures(str(folder), every_n_steps=2),
    ]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(NUM_STEPS, 1))))
    if not (folder / "metrics.csv").exists():
        return {}
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {tag: {int(row["step"]): float(row[tag]) for row in rows if row[tag]} for tag in rows[0]}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_complex_parameters_have_every_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = curves(tmp_path, Parabola())
    steps = range(NUM_STEPS)
    assert seen["learning_rate_effect/descent_ratio"] == pytest.approx(dict.fromkeys(steps, 1 - RATE), rel=1e-4)
    assert seen["learning_rate_effect/critical"] == pytest.approx(dict.fromkeys(steps, 1.0), rel=1e-4)
    assert seen["curvature/sharpness"] == pytest.approx(dict.fromkeys(steps, 2.0), rel=1e-5)
    assert list(tmp_path.glob("step_along_gradient_*.png"))
    assert said(caplog) == []


def test_a_step_of_complex_parameters_is_drawn_with_the_rate_that_it_had() -> None:
    module = Parabola()
    step = BatchStep(0, BatchLoss(module, None))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 - 2 * RATE)
    step.ends()
    profile, rate = step.profile()
    assert rate == pytest.approx(RATE, rel=1e-6)
    assert profile.best == pytest.approx(0.5, rel=1e-4)


class HalfAGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # torch takes any number of them
        return gradient.real / 2 + 1j * gradient.imag


def test_the_gradient_of_complex_parameters_is_checked_and_a_wrong_one_is_found() -> None:
    def wrong(module: Any, batch: Any) -> Tensor:
        return HalfAGradient.apply(module.weight).abs().square().sum()  # type: ignore[no-any-return, no-untyped-call]  # apply has no types

    assert check(Parabola(), None).passed
    assert [each.parameter for each in check(Parabola(), None, wrong).disagreements] == ["weight"]


def test_the_sharpness_of_weights_that_were_frozen_until_now_is_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = curves(tmp_path, Valley())
    assert seen["curvature/sharpness"] == pytest.approx({0: 2.0, 1: 2.0, 2: 6.0, 3: 6.0}, rel=1e-5)
    assert said(caplog) == []


def test_without_a_rate_the_sharpness_is_written_and_a_line_says_what_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = curves(tmp_path, Rateless())
    assert seen["curvature/sharpness"] == pytest.approx(dict.fromkeys(range(NUM_STEPS), 2.0), rel=1e-5)
    assert seen["learning_rate_effect/effective"] == pytest.approx(dict.fromkeys(range(NUM_STEPS), RATE), rel=1e-5)
    assert not {"learning_rate_effect/stability", "learning_rate_effect/descent_ratio"} & seen.keys()
    assert sorted(said(caplog)) == [
        "CriticalLearningRate is off from here on: the optimizer has no learning rate.",
        "learning_rate_effect/descent_ratio is off from here on: a parameter group has no learning rate.",
    ]


class Outside(Parabola):
    """Its optimizer holds a tensor that is no parameter: neither a direction nor a Hessian would be whole."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = [torch.ones(1, requires_grad=True)]

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * self.outside[0].sum()

    def configure_optimizers(self) -> Any:
        return SGD([*self.parameters(), *self.outside], lr=RATE)


def test_of_a_part_of_what_moves_there_is_no_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = curves(tmp_path, Outside())
    assert not {"curvature/sharpness", "learning_rate_effect/critical", "learning_rate_effect/descent_ratio"} & {*seen}
    why = "is off from here on: the optimizer holds a tensor that is no parameter of the module."
    named = ("CriticalLearningRate", "SharpnessMonitor", "learning_rate_effect/descent_ratio")
    assert sorted(said(caplog)) == [f"{each} {why}" for each in named]
    assert seen["update_ratio/total"].keys() == set(range(NUM_STEPS))


class OfPredictions(Parabola):
    """One argument is enough for it, and yet it is no loss of a batch: Lightning's own BoringModel has such a one."""

    def loss(self, predictions: Any, targets: Any = None) -> Tensor:
        return nn.functional.mse_loss(predictions[0], torch.zeros(1, 1) if targets is None else targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss([self.shift.expand(1, 1)])


def test_a_loss_of_predictions_is_no_loss_of_a_batch_and_no_figure_comes_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = curves(tmp_path, OfPredictions())
    assert not [tag for tag in seen if tag.startswith("curvature") or "critical" in tag or "descent" in tag]
    assert sorted(said(caplog)) == [
        "SharpnessMonitor is off from here on: the loss does not depend on any parameter, so it cannot be the loss "
        "of a batch.",
        "learning_rate_effect/descent_ratio is off from here on: the loss is 1 where `training_step` returned 2.25.",
        "pictures/step_along_gradient is left out. This is because the gradient is zero.",
    ]


class WarmsUp(Parabola):
    """Its first step has a rate of 0."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=RATE)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 1))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_a_rate_of_zero_is_no_reason_to_be_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = curves(tmp_path, WarmsUp())
    assert seen["learning_rate_effect/critical"] == pytest.approx(dict.fromkeys((1, 2, 3), 1.0), rel=1e-4)
    assert seen["learning_rate_effect/stability"] == pytest.approx({0: 0.0, 1: RATE, 2: RATE, 3: RATE}, rel=1e-4)
    assert said(caplog) == []


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer", "ignore:.*returned None")
def test_without_an_optimizer_one_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert curves(tmp_path, Untrained()) == {}
    assert [each.partition(", ")[2] for each in said(caplog)] == [
        "like everything that evaluates a step's loss again: there is no optimizer."
    ]
