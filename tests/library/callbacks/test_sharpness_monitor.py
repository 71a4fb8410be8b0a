import logging
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from downslope.callbacks import SharpnessMonitor
from downslope.tables.synthetic import synthetic_table
from template.regression.manual import ManualLinearRegression
from template.regression.model import LinearRegression
from tests.conftest import ROOT, read_events, scalars
from tests.table_data import data_of

SHARPNESS, STABILITY = "curvature/sharpness", "learning_rate_effect/stability"
CLOSE = 1e-4  # float32, and three products from the last eigenvector
seed = torch.Generator().manual_seed(0)
INPUTS, TARGET = torch.randn(24, 3, generator=seed), torch.randn(24, 1, generator=seed)


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


class Automatic(LightningModule):
    """Somebody else's module, which knows nothing of us."""

    learning_rate = 0.1

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or globals()["network"]()

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.learning_rate)


class WithoutLoss(Automatic):
    """Gives no leave."""

    loss = None


class TwoArguments(WithoutLoss):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert batch_idx == 0
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])


class OneArgument(WithoutLoss):
    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.network(batch[0]), batch[1])}


class ManualWithoutLoss(WithoutLoss):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor]) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        nn.functional.mse_loss(self.network(batch[0]), batch[1]).backward()
        optimizer.step()


class Manual(ManualWithoutLoss):
    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])


class Witness(Callback):
    """Keeps the parameters, in float64, that each step begins with."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.parameters.append({name: p.detach().double().clone() for name, p in pl_module.network.named_parameters()})

    def sharpness(self, inputs: Tensor = INPUTS, target: Tensor = TARGET) -> list[float]:
        """Of a network as above, by forming the whole Hessian."""
        return [
            dense_sharpness(network().double(), state, inputs.double(), target.double()) for state in self.parameters
        ]


def dense_sharpness(module: nn.Module, state: dict[str, Tensor], inputs: Tensor, target: Tensor) -> float:
    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([tensor.numel() for tensor in state.values()])
        named = {name: piece.view_as(state[name]) for name, piece in zip(state, pieces, strict=True)}
        return (functional_call(module, named, (inputs,)) - target).square().mean()

    return float(torch.linalg.eigvalsh(hessian(loss)(torch.cat([p.flatten() for p in state.values()])))[-1])


def fit(folder: Path, module: LightningModule, *callbacks: Callback, batch_size: int = 24, **settings: Any) -> Trainer:
    trainer = Trainer(
        **{
            "max_epochs": 6,
            "accelerator": "cpu",
            "logger": TensorBoardLogger(folder, name="", version=""),
            "callbacks": list(callbacks),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **settings,
        }
    )
    trainer.fit(module, DataLoader(TensorDataset(INPUTS, TARGET), batch_size=batch_size))
    return trainer


def values(folder: Path, tag: str = SHARPNESS) -> list[float]:
    return [value for _, value in scalars(folder, tag)]


LEAVE = {
    "loss(batch)": (Automatic, None),
    "manual": (Manual, None),
    "training_step(batch, batch_idx)": (TwoArguments, "training_step"),
    "training_step(batch)": (OneArgument, "training_step"),
    "a function": (
        ManualWithoutLoss,
        lambda module, batch: nn.functional.mse_loss(module.network(batch[0]), batch[1]),
    ),
}


@pytest.mark.parametrize(("kind", "loss"), LEAVE.values(), ids=LEAVE)
def test_the_sharpness_is_that_of_the_dense_hessian(tmp_path: Path, kind: type[Automatic], loss: Any) -> None:
    witness = Witness()
    fit(tmp_path, kind(), SharpnessMonitor(every_n_steps=1, loss=loss), witness)
    assert [step for step, _ in scalars(tmp_path, SHARPNESS)] == list(range(6))
    assert values(tmp_path) == pytest.approx(witness.sharpness(), rel=CLOSE)
    assert values(tmp_path, STABILITY) == pytest.approx([0.05 * value for value in witness.sharpness()], rel=CLOSE)


def test_the_comparison_above_catches_an_eigenvalue_that_is_a_thousandth_off(tmp_path: Path) -> None:
    witness = Witness()
    fit(tmp_path, Automatic(), SharpnessMonitor(every_n_steps=1), witness)
    assert [1.001 * value for value in values(tmp_path)] != pytest.approx(witness.sharpness(), rel=CLOSE)


@pytest.mark.parametrize("kind", [LinearRegression, ManualLinearRegression])
def test_our_line_knows_the_sharpness_of_all_training_rows(tmp_path: Path, kind: type[LinearRegression]) -> None:
    data = data_of(synthetic_table(40, 2, 0.1, 4.0, seed=5), batch_size=8, seed=0)
    module = kind(2, partial(SGD, lr=0.1), {"scheduler": None, "interval": "epoch", "monitor": "val/loss"})
    Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[SharpnessMonitor(every_n_steps=3)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)
    inputs = np.column_stack([data.parts["train"][0].double().numpy(), np.ones(32)])
    expected = 2 / 32 * np.linalg.norm(inputs, 2) ** 2  # of (2/N)XᵀX
    assert scalars(tmp_path, SHARPNESS) == [(step, pytest.approx(expected, rel=1e-6)) for step in (0, 3, 6)]
    assert values(tmp_path, STABILITY) == pytest.approx([0.05 * expected] * 3, rel=1e-6)


def test_a_line_on_others_data_is_measured(tmp_path: Path) -> None:
    class Others(Automatic):
        def least_squares(self) -> None:
            return None

    witness = Witness()
    fit(tmp_path, Others(), SharpnessMonitor(), witness)
    assert values(tmp_path) == pytest.approx(witness.sharpness()[:1], rel=CLOSE)


@pytest.mark.parametrize(("factor", "growth"), [(0.99, 0.98), (1.01, 1.02)])
def test_gradient_descent_shrinks_below_the_measured_limit_and_grows_above(
    tmp_path: Path, factor: float, growth: float
) -> None:
    class Line(Automatic):
        distances: tuple[float, ...] = ()

        def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
            loss = nn.functional.mse_loss(self.network(batch[0]), batch[1])
            gradients = torch.autograd.grad(loss, self.network.parameters())
            self.distances += (float(torch.cat([gradient.flatten() for gradient in gradients]).norm()),)

    seed_everything(0, verbose=False)
    fit(tmp_path / "measured", Line(nn.Linear(3, 1)), SharpnessMonitor(), max_epochs=1)
    line = Line(nn.Linear(3, 1))
    line.learning_rate = factor * 2 / values(tmp_path / "measured")[0]
    fit(tmp_path / "descent", line, SharpnessMonitor(), max_epochs=120)
    assert values(tmp_path / "descent", STABILITY)[0] == pytest.approx(factor, rel=1e-6)
    assert line.distances[-1] / line.distances[-2] == pytest.approx(growth, rel=1e-3)


class Stateful(Automatic):
    """All that a second forward could disturb."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)))
        self.mean_loss, self.losses, self.num_calls, self.num_gradients = MeanMetric(), [], 0, 0
        self.running = torch.zeros(())
        self.network[0].weight.register_hook(self.seen)

    def seen(self, gradient: Tensor) -> None:
        self.num_gradients += 1

    def loss(self, batch: list[Tensor]) -> Tensor:
        batch[0].mul_(1.01)
        noise = random.random() + float(np.random.standard_normal()) + float(torch.rand(()))  # noqa: NPY002
        loss = nn.functional.mse_loss(self.network(batch.pop(0) + 0.1 * noise), batch[0])
        with torch.no_grad():
            self.network[0].bias.clamp_(-0.1, 0.1)
        self.mean_loss(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"calls": float(self.num_calls)}, on_epoch=True, reduce_fx="sum")
        self.logger.experiment.add_scalar("direct", loss, self.global_step)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.running += loss.detach()
        self.losses.append(loss.detach())
        self.num_calls += 1
        return loss


@pytest.mark.parametrize("batch", ["probe", "training"])
def test_watching_changes_no_bit(tmp_path: Path, batch: Any) -> None:
    def run(name: str, *callbacks: Callback) -> tuple[Stateful, dict[str, Tensor], Tensor]:
        seed_everything(0, verbose=False)
        module = Stateful()
        trainer = fit(tmp_path / name, module, *callbacks, batch_size=8, max_epochs=3, accumulate_grad_batches=2)
        return module, dict(trainer.callback_metrics), torch.rand(3)

    watched, watched_metrics, watched_random = run("watched", SharpnessMonitor(1, batch=batch))
    alone, alone_metrics, alone_random = run("alone")
    assert len(values(tmp_path / "watched")) == 6  # two optimizer steps of an epoch's three batches
    torch.testing.assert_close(dict(watched.state_dict()), dict(alone.state_dict()), rtol=0, atol=0)
    assert all(torch.equal(*pair) for pair in zip(watched.parameters(), alone.parameters(), strict=True))
    assert float(watched.mean_loss.compute()) == float(alone.mean_loss.compute())
    assert torch.equal(watched.running, alone.running)
    assert torch.equal(torch.stack(watched.losses), torch.stack(alone.losses))
    assert watched.num_calls == alone.num_calls == 9
    assert watched.num_gradients == alone.num_gradients == 9
    assert watched_metrics == alone_metrics
    assert torch.equal(watched_random, alone_random)
    for tag in read_events(tmp_path / "alone").Tags()["scalars"]:
        assert scalars(tmp_path / "watched", tag) == scalars(tmp_path / "alone", tag)


def test_the_probe_stays_and_the_training_batch_moves_on(tmp_path: Path) -> None:
    for batch in ("probe", "training"):
        witness = Witness()
        fit(tmp_path / batch, Automatic(), SharpnessMonitor(1, 10, batch), witness, batch_size=12, max_epochs=1)
        first, second = (witness.sharpness(INPUTS[part], TARGET[part]) for part in (slice(12), slice(12, 24)))
        expected = [first[0], first[1] if batch == "probe" else second[1]]
        assert values(tmp_path / batch) == pytest.approx(expected, rel=CLOSE)


def test_frozen_parameters_do_not_count_and_the_largest_rate_does(tmp_path: Path) -> None:
    class Groups(Automatic):
        def configure_optimizers(self) -> SGD:
            self.network[0].requires_grad_(False)
            weight, bias = self.network[2].parameters()
            return SGD([{"params": [weight], "lr": 0.2}, {"params": [bias], "lr": 0.3}])

    witness = Witness()
    fit(tmp_path, Groups(), SharpnessMonitor(), witness)
    state = witness.parameters[0]
    hidden = torch.tanh(INPUTS.double() @ state["0.weight"].T + state["0.bias"])
    inputs = torch.cat([hidden, torch.ones(24, 1, dtype=torch.float64)], dim=1)
    expected = 2 / 24 * float(torch.linalg.matrix_norm(inputs, 2)) ** 2
    assert values(tmp_path) == pytest.approx([expected], rel=CLOSE)
    assert values(tmp_path, STABILITY) == pytest.approx([0.15 * expected], rel=CLOSE)


PRECISIONS = {
    "bfloat16": {"precision": "bf16-mixed"},
    "float16": {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
    "float64": {"precision": "64-true"},
}


@pytest.mark.parametrize("settings", PRECISIONS.values(), ids=PRECISIONS)
def test_the_precision_is_that_of_the_parameters(tmp_path: Path, settings: dict[str, Any]) -> None:
    witness = Witness()
    fit(tmp_path, Automatic(), SharpnessMonitor(every_n_steps=2), witness, **settings)
    assert values(tmp_path) == pytest.approx(witness.sharpness()[::2], rel=1e-3)


def test_half_precision_weights_give_two_digits(tmp_path: Path) -> None:
    witness = Witness()
    fit(tmp_path, Automatic(), SharpnessMonitor(), witness, precision="bf16-true")
    assert values(tmp_path) == pytest.approx(witness.sharpness()[:1], rel=3e-2)


def compiled_whole() -> Any:
    return torch.compile(Automatic(), backend="aot_eager")


def compiled_part() -> Any:
    return Automatic(torch.compile(network(), backend="aot_eager"))


@pytest.mark.parametrize("make", [compiled_whole, compiled_part])
def test_compiled_modules_are_measured_uncompiled(tmp_path: Path, make: Any) -> None:
    witness = Witness()
    fit(tmp_path, make(), SharpnessMonitor(every_n_steps=1), witness, max_epochs=3)
    parameters = [{name.removeprefix("_orig_mod."): p for name, p in state.items()} for state in witness.parameters]
    witness.parameters = parameters
    assert values(tmp_path) == pytest.approx(witness.sharpness(), rel=CLOSE)


def test_attention_is_measured_by_a_kernel_that_can_be_derived_twice(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(2, 12)
            self.output = nn.Linear(4, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            positions = torch.arange(3).expand(inputs.shape)
            projected = self.project(torch.stack([inputs, positions.to(inputs)], dim=-1))
            attended = nn.functional.scaled_dot_product_attention(*projected[:, None].chunk(3, dim=-1))
            return self.output(attended.mean((1, 2)))

    seed_everything(0, verbose=False)
    module = Automatic(Attention())
    state = {name: parameter.detach().double().clone() for name, parameter in module.network.named_parameters()}
    fit(tmp_path, module, SharpnessMonitor(num_products=40), max_epochs=1)
    with sdpa_kernel(SDPBackend.MATH):
        expected = dense_sharpness(Attention().double(), state, INPUTS.double(), TARGET.double())
    assert values(tmp_path) == pytest.approx([expected], rel=CLOSE)


class TwoOptimizers(Manual):
    def configure_optimizers(self) -> list[SGD]:
        return [SGD(self.network[0].parameters(), lr=0.1), SGD(self.network[2].parameters(), lr=0.1)]

    def training_step(self, batch: list[Tensor]) -> None:
        self.manual_backward(self.loss(batch))


class Sparse(Automatic):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(5, 1, sparse=True))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.network(batch[0][:, 0].long().clamp(0, 4)), batch[1])


class NotTwice(Automatic):
    def loss(self, batch: list[Tensor]) -> Tensor:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(context: Any, inputs: Tensor) -> Tensor:
                return inputs.clone()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(context: Any, gradient: Tensor) -> Tensor:
                return gradient

        return Once.apply(self.network(batch[0])).square().mean()


class NoLoss(Automatic):
    def loss(self, batch: list[Tensor]) -> None:
        return None


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (TwoOptimizers, "there are several optimizers"),
        (OneArgument, "OneArgument has no method `loss(batch)`: add one, or give the callback `loss=`"),
        (ManualWithoutLoss, "ManualWithoutLoss has no method `loss(batch)`: add one"),
        (Sparse, "a gradient is sparse"),
        (NotTwice, "is `once_differentiable`"),
        (NoLoss, "`loss` must return the loss, one number, got None"),
    ],
)
def test_where_it_cannot_be_had_one_warning_says_why_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: type[LightningModule], reason: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="downslope"):
        trainer = fit(tmp_path, make(), SharpnessMonitor(every_n_steps=1))
    (message,) = caplog.messages
    assert re.match(r"(SharpnessMonitor is off from here on|curvature/sharpness is off, like .*): ", message)
    assert reason in message
    assert trainer.current_epoch == 6
    assert SHARPNESS not in read_events(tmp_path).Tags()["scalars"]


def test_a_diverged_loss_is_written_as_nan(tmp_path: Path) -> None:
    module = Automatic(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    module.learning_rate = float("nan")
    fit(tmp_path, module, SharpnessMonitor(every_n_steps=1), max_epochs=2)
    assert np.isfinite(values(tmp_path)).tolist() == [True, False]


def test_another_logger_gets_the_values(tmp_path: Path) -> None:
    fit(tmp_path, Automatic(), SharpnessMonitor(), logger=CSVLogger(tmp_path, name="", version=""))
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert SHARPNESS in header
    assert STABILITY in header
    assert len(lines) == 1


def test_without_a_logger_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharpnessMonitor, "_measure", None)
    fit(tmp_path, Automatic(), SharpnessMonitor(every_n_steps=1), logger=False)


def test_the_option_is_the_default_of_the_class() -> None:
    option = yaml.safe_load((ROOT / "conf" / "callbacks" / "sharpness_monitor.yaml").read_text())
    assert vars(instantiate(option["sharpness_monitor"])) == vars(SharpnessMonitor())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1, got 0"),
        ({"num_products": 1.5}, "`num_products` must be a whole number of at least 1, got 1.5"),
        ({"loss": "loss"}, "`loss` must be a function of module and batch, 'training_step' or null, got 'loss'"),
        ({"batch": "all"}, "`batch` must be 'probe' or 'training', got 'all'"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**options)
