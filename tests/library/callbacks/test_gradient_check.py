import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from downslope.callbacks import GradientCheck
from downslope.tables.batches import Batches, ShuffledOrder
from template.regression.manual import ManualLinearRegression
from template.regression.model import LinearRegression

REPOSITORY = Path(__file__).parents[3]


class Network(LightningModule):
    """A plain user's module with all that a check could disturb."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.detached = detached

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        features, target = batch
        prediction = self.network(features)
        loss = nn.functional.mse_loss(prediction.detach() if self.detached else prediction, target)
        self.log("train/loss", loss)
        return loss + 1e-3 * self.network[0].weight.square().sum()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def fit(module: LightningModule, *callbacks: GradientCheck, flat: bool = False) -> Trainer:
    torch.manual_seed(1)
    target = torch.randn(24) if flat else torch.randn(24, 1)
    batches = Batches(torch.randn(24, 3), target, 8, ShuffledOrder(24, seed=0))
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches, batches if flat else None)
    return trainer


def network(**settings: bool) -> Network:
    torch.manual_seed(0)
    return Network(**settings)


def line(kind: type) -> LightningModule:
    torch.manual_seed(0)
    return kind(3, lambda parameters: torch.optim.SGD(parameters, lr=0.1), {"scheduler": None})


def test_training_is_the_same_to_the_bit() -> None:
    plain, checked = network(), network()
    logged = fit(plain).callback_metrics
    random_after = torch.get_rng_state()
    callback = GradientCheck()
    assert fit(checked, callback).callback_metrics == logged
    assert callback.report is not None
    assert callback.report.passed
    assert torch.equal(torch.get_rng_state(), random_after)
    for (name, expected), value in zip(plain.state_dict().items(), checked.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("kind", [LinearRegression, ManualLinearRegression])
def test_lines_of_both_kinds_pass_and_train_the_same(kind: type) -> None:
    plain, checked, callback = line(kind), line(kind), GradientCheck()
    logged = fit(plain, flat=True).callback_metrics
    assert fit(checked, callback, flat=True).callback_metrics == logged
    assert callback.report is not None
    assert callback.report.num_parameters == 2
    assert callback.report.passed
    assert torch.equal(checked.linear.weight, plain.linear.weight)


def test_wrong_gradient_ends_training_before_its_first_step() -> None:
    module = network(detached=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"`network\.3\.weight`: autograd says 0 .* cut out of the graph"):
        fit(module, GradientCheck())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_wrong_gradient_is_a_warning_where_asked_for() -> None:
    with pytest.warns(UserWarning, match=r"5 of 6 parameters disagree"):
        trainer = fit(network(detached=True), GradientCheck(on_disagreement="warn"))
    assert trainer.global_step == 6


def test_without_leave_one_line_says_so_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Foreign(Network):
        loss = None

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    callback = GradientCheck()
    assert fit(Foreign(), callback).global_step == 6
    assert callback.report is None
    (line,) = [message for message in caplog.messages if "GradientCheck" in message]
    assert line.startswith(
        "GradientCheck is off, like everything that evaluates a step's loss again: Foreign has no method"
    )


def test_check_runs_once() -> None:
    callback = GradientCheck()
    fit(network(), callback)
    first = callback.report
    fit(network(), callback)
    assert callback.report is first


def test_nothing_is_written_to_the_logger(tmp_path: Path) -> None:
    class Writes(Network):
        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.logger.experiment.add_scalar("mine", 1.0)
            return super().loss(batch)

    written: list[str] = []

    class Recording(TensorBoardLogger):
        @property
        def experiment(self) -> Any:
            return SimpleNamespace(add_scalar=lambda tag, value: written.append(tag))

        log_metrics = log_hyperparams = log_graph = save = finalize = lambda self, *args, **kwargs: None

    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(8, 3), torch.randn(8, 1)), batch_size=4)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=Recording(tmp_path), callbacks=[GradientCheck()],
        log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        trainer.fit(Writes(), data)
    assert written == ["mine"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_disagreement": "ignore"}, "`on_disagreement` must be 'raise' or 'warn', got 'ignore'"),
        ({"num_directions": 0}, "`num_directions` must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientCheck(**settings)


def test_option_trains_through_hydra(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "scripts/train.py",
        "callbacks=gradient_check",
        "trainer.max_epochs=1",
        "device=cpu",
    ]
    run = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path}"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    written = (tmp_path / "train.log").read_text()
    assert "gradient check: autograd, central differences and" in written
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
