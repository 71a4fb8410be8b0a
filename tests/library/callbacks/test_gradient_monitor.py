from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from downslope.callbacks import GradientMonitor
from downslope.tables.synthetic import synthetic_table
from template.regression.data import TableData
from template.regression.manual import ManualLinearRegression
from template.regression.model import LinearRegression
from tests.conftest import read_events, scalars
from tests.table_data import data_of

CONSTANT = {"scheduler": None, "interval": "epoch", "monitor": "val/loss"}
MODES = [LinearRegression, ManualLinearRegression]


class Recorder:
    """The independent witness: what plain autograd and plain SGD do with the same rows."""

    def __init__(self, data: TableData, epochs: int, learning_rate: float) -> None:
        seed_everything(0, verbose=False)
        weight, bias = (parameter.detach().clone().requires_grad_() for parameter in nn.Linear(2, 1).parameters())
        self.gradients: list[tuple[Tensor, Tensor]] = []
        self.parameters: list[tuple[Tensor, Tensor]] = []
        data.setup("fit")
        batches = data.train_dataloader()
        for epoch in range(epochs):
            batches.sampler.set_epoch(epoch)
            for features, target in batches:
                loss = ((features @ weight[0] + bias - target) ** 2).mean()
                gradients = torch.autograd.grad(loss, (weight, bias))
                self.gradients.append(gradients)
                self.parameters.append((weight.detach().clone(), bias.detach().clone()))
                with torch.no_grad():
                    weight -= learning_rate * gradients[0]
                    bias -= learning_rate * gradients[1]


def datamodule() -> TableData:
    return data_of(synthetic_table(40, 2, 0.1, 4.0, seed=5), batch_size=8, seed=0)


def fit(folder: Path, kind: type[LinearRegression], *callbacks: GradientMonitor, epochs: int = 3) -> LinearRegression:
    seed_everything(0, verbose=False)
    module = kind(2, partial(SGD, lr=0.1), CONSTANT)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=datamodule())
    return module


@pytest.mark.parametrize("kind", MODES)
def test_every_figure_is_that_of_an_independent_recorder(tmp_path: Path, kind: type[LinearRegression]) -> None:
    fit(tmp_path, kind, GradientMonitor(every_n_steps=1))
    witness = Recorder(datamodule(), epochs=3, learning_rate=0.1)
    steps = range(len(witness.gradients))
    assert len(steps) == 12  # 32 training rows in batches of 8, three times

    def check(tag: str, expected: list[float]) -> None:
        logged = scalars(tmp_path, tag)
        assert [step for step, _ in logged] == list(steps)
        assert [value for _, value in logged] == pytest.approx(expected, rel=1e-5)  # float32, another order of sums

    weights = [gradient for gradient, _ in witness.gradients]
    biases = [gradient for _, gradient in witness.gradients]
    check("gradient_norm/linear.weight", [float(gradient.norm()) for gradient in weights])
    check("gradient_norm/linear.bias", [float(gradient.norm()) for gradient in biases])
    for stage in ("total", "applied"):  # nobody clips
        check(f"gradient_norm/{stage}", [float(torch.cat([w.flatten(), b]).norm()) for w, b in witness.gradients])
    check("gradient_value/linear.weight[0,1]", [float(gradient[0, 1]) for gradient in weights])
    check("gradient_value/linear.bias[0]", [float(gradient[0]) for gradient in biases])
    check("parameter_value/linear.weight[0,0]", [float(weight[0, 0]) for weight, _ in witness.parameters])


def test_the_comparison_above_catches_a_gradient_that_is_a_thousandth_off() -> None:
    witness = Recorder(datamodule(), epochs=1, learning_rate=0.1)
    norm = float(witness.gradients[0][0].norm())
    assert norm * 1.001 != pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("kind", MODES)
def test_watching_changes_no_bit(tmp_path: Path, kind: type[LinearRegression]) -> None:
    watched = fit(tmp_path / "watched", kind, GradientMonitor(every_n_steps=1, histogram_every_n_steps=1))
    alone = fit(tmp_path / "alone", kind)
    assert all(torch.equal(*pair) for pair in zip(watched.parameters(), alone.parameters(), strict=True))


def test_it_looks_at_the_first_steps_and_then_only_every_so_many(tmp_path: Path) -> None:
    monitor = GradientMonitor(every_n_steps=5, histogram_every_n_steps=10, num_first_steps=3)
    fit(tmp_path, LinearRegression, monitor)
    assert [step for step, _ in scalars(tmp_path, "gradient_norm/total")] == [0, 1, 2, 5, 10]
    assert [event.step for event in read_events(tmp_path).Histograms("gradient/linear.weight")] == [0, 10]


def test_a_histogram_holds_every_element(tmp_path: Path) -> None:
    fit(
        tmp_path,
        LinearRegression,
        GradientMonitor(every_n_steps=1, histogram_every_n_steps=1),
        epochs=1,
    )
    witness = Recorder(datamodule(), epochs=1, learning_rate=0.1)
    first = read_events(tmp_path).Histograms("gradient/linear.weight")[0].histogram_value
    gradient = witness.gradients[0][0]
    assert first.num == 2
    assert first.sum == pytest.approx(float(gradient.sum()), rel=1e-5)
    assert first.min == pytest.approx(float(gradient.min()), rel=1e-5)


class Foreign(LightningModule):
    """Somebody else's module: a frozen, an unused and a large parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(20, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.unused = nn.Linear(1, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.frozen(self.large(batch)).square().mean()

    def configure_optimizers(self) -> SGD:
        groups = [
            {"params": self.large.parameters(), "lr": 0.01},
            {"params": self.unused.parameters(), "lr": 0.02},
        ]
        return SGD(groups, lr=0.1)


def fit_foreign(folder: Path, monitor: GradientMonitor, logger: object, module: Foreign | None = None) -> None:
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    ).fit(module or Foreign(), DataLoader(torch.randn(8, 20), batch_size=4))


def test_a_foreign_module_is_watched(tmp_path: Path) -> None:
    fit_foreign(tmp_path, GradientMonitor(every_n_steps=1), TensorBoardLogger(tmp_path, name="", version=""))
    tags = read_events(tmp_path).Tags()["scalars"]
    assert "gradient_norm/large.weight" in tags
    assert not any("frozen" in tag or "unused" in tag for tag in tags)
    assert not any(tag.startswith("gradient_value/large.weight") for tag in tags)  # 20 elements are too many
    assert "gradient_value/large.bias[0]" in tags


def test_of_a_model_of_more_than_64_elements_no_element_has_a_tag(tmp_path: Path) -> None:
    class Larger(Foreign):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.unused = nn.Linear(width, 1)  # 20 + 1 elements are in `large`

    for width, has_tags in ((42, True), (43, False)):
        folder = tmp_path / str(width)
        logger = TensorBoardLogger(folder, name="", version="")
        fit_foreign(folder, GradientMonitor(every_n_steps=1), logger, Larger(width))
        assert ("gradient_value/large.bias[0]" in read_events(folder).Tags()["scalars"]) == has_tags


def test_another_logger_gets_the_scalars(tmp_path: Path) -> None:
    fit_foreign(tmp_path, GradientMonitor(every_n_steps=1), CSVLogger(tmp_path, name="", version=""))
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "gradient_norm/total" in header
    assert len(rows) == 2


def test_without_a_logger_nothing_happens(tmp_path: Path) -> None:
    fit_foreign(tmp_path, GradientMonitor(every_n_steps=1), False)
    assert not list(tmp_path.iterdir())


def test_a_gradient_of_nothing_but_nan_does_not_stop_training(tmp_path: Path) -> None:
    class Broken(Foreign):
        def training_step(self, batch: Tensor) -> Tensor:
            return super().training_step(batch) * float("nan")

    Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[GradientMonitor(every_n_steps=1, histogram_every_n_steps=1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    ).fit(Broken(), DataLoader(torch.randn(4, 20), batch_size=4))
    assert len(scalars(tmp_path, "gradient_norm/total")) == 1


@pytest.mark.parametrize("name", ["every_n_steps", "histogram_every_n_steps"])
def test_a_frequency_of_zero_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1, got 0"):
        GradientMonitor(**{name: 0})
