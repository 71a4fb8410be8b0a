from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from downslope.callbacks import CriticalLearningRate, VerdictMonitor

INPUTS = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS @ torch.tensor([1.0, -2.0, 0.5]) + 0.3


class Line(LightningModule):
    """A line, on which the loss along any direction is a parabola."""

    def __init__(self, optimizer: Any, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(dropout), nn.BatchNorm1d(3) if dropout else nn.Identity(), nn.Linear(3, 1))
        self.make_optimizer = optimizer
        self.steps: list[tuple[list[Tensor], list[Tensor], Any]] = []

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def training_step(self, batch: Any) -> Tensor:
        self.batch = batch
        return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        before = [parameter.detach().clone() for parameter in self.parameters()]
        super().optimizer_step(*arguments, **named)
        after = [parameter.detach().clone() for parameter in self.parameters()]
        self.steps.append((before, after, self.batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class NoLoss(Line):
    loss = None  # type: ignore[assignment]


def fit(tmp_path: Path, module: Line, *callbacks: Any, epochs: int = 4, **options: Any) -> Trainer:
    seed_everything(1, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(INPUTS, TARGETS), 16, shuffle=True))
    return trainer


def by_hand(before: list[Tensor], after: list[Tensor], batch: Any, rate: float) -> float:
    """2 g·d / d'Hd in float64, from the batch's own design matrix: H = (2/N) ZᵀZ."""
    design = torch.cat([batch[0], torch.ones(len(batch[0]), 1)], dim=1).double()
    start, end = (torch.cat([each.flatten() for each in weights]).double() for weights in (before, after))
    direction = (start - end) / rate
    gradient = 2 / len(design) * design.T @ (design @ start - batch[1].double())
    curvature = direction @ (2 / len(design) * design.T @ design) @ direction
    return float(2 * gradient @ direction / curvature)


OPTIMIZERS = {
    "sgd": (lambda parameters: torch.optim.SGD(parameters, lr=0.05), 0.05),
    "momentum": (lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.5), 0.01),
    "adam": (lambda parameters: torch.optim.Adam(parameters, lr=0.02), 0.02),
    "weight decay": (lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1), 0.02),
    "two groups": (
        lambda parameters: torch.optim.SGD(
            [{"params": each, "lr": lr} for each, lr in zip(parameters, (0.05, 0.2), strict=True)]
        ),
        0.05,
    ),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in OPTIMIZERS),
        ("sgd", {"gradient_clip_val": 0.01}),
        ("sgd", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        ("adam", {"precision": "bf16-mixed"}),
    ],
)
def test_on_a_line_it_is_the_closed_form_along_the_step_that_was_taken(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    optimizer, rate = OPTIMIZERS[name]
    critical, module = CriticalLearningRate(steps=(0, 2, 5), every_n_steps=1000), Line(optimizer)
    fit(tmp_path, module, critical, **options)
    assert [step for step, *_ in critical.measured] == [0, 2, 5]
    for step, value, used in critical.measured:
        assert used == rate
        assert value == pytest.approx(by_hand(*module.steps[step], rate), rel=0.03)
    assert critical.least == min(value for _, value, _ in critical.measured)


def test_training_is_the_same_to_the_bit_dropout_drops_the_same_and_averages_of_batches_stay(tmp_path: Path) -> None:
    def train(*callbacks: Any) -> tuple[list[Tensor], Tensor]:
        seed_everything(5, verbose=False)
        module = Line(OPTIMIZERS["adam"][0], dropout=0.3)
        fit(tmp_path, module, *callbacks)
        return [*module.state_dict().values()], torch.get_rng_state()

    observed, observed_state = train(CriticalLearningRate(steps=range(12)))
    alone, alone_state = train()
    assert all(torch.equal(*pair) for pair in zip(observed, alone, strict=True))
    assert torch.equal(observed_state, alone_state)


def test_a_module_without_leave_is_left_alone_and_one_line_says_how_to_give_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    critical = CriticalLearningRate()
    fit(tmp_path, NoLoss(OPTIMIZERS["sgd"][0]), critical)
    assert critical.least is None
    (message,) = [each for each in caplog.messages if "critical" in each]
    assert message.startswith(
        "learning_rate_effect/critical is off, like everything that evaluates a step's loss again: NoLoss has no method"
    )


def test_a_step_uphill_has_a_ratio_above_one_and_the_verdict_hears_of_it(tmp_path: Path) -> None:
    critical, verdict = CriticalLearningRate(steps=(0, 1, 2)), VerdictMonitor(print_verdict=False)
    rate = 3.0
    fit(tmp_path, Line(lambda parameters: torch.optim.SGD(parameters, lr=rate)), critical, verdict, epochs=6)
    step, value, used = critical.measured[0]
    assert (step, used) == (0, rate)
    assert rate / value > 1
    assert verdict.verdict is not None
    assert verdict.verdict.word in ("too_large", "non_finite")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": (0, 1.5)}, "`steps` must be a whole number of at least 0, got 1.5"),
        ({"every_n_steps": 0}, "`every_n_steps` must be"),
        ({"every_n_steps": 1.5}, "`every_n_steps` must be"),
        ({"loss": "forward"}, "`loss` must be a function of module and batch"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CriticalLearningRate(**settings)
