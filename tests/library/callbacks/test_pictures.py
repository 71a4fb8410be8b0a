"""The pictures that a run leaves, opened, and what is drawn on them held against the weights."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import downslope.callbacks.pictures
from downslope.callbacks import FlightRecorder, Pictures
from downslope.logs.tensorboard import TensorBoard
from downslope.pictures.step_along_gradient import name_step
from downslope.steps.optimizer_steps import OptimizerStep
from template.regression.data import SyntheticData, TableData
from template.regression.model import LinearRegression
from tests.conftest import read_events

RED_PIXEL = (0xD5, 0x5E, 0x00)


class Kept(Pictures):
    """Keeps the last figures for the test to read."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept: dict[str, Figure] = {}

    def figures(self) -> "dict[str, Figure]":
        self.kept = super().figures()
        return self.kept

    def axes(self, name: str) -> Axes:
        (axes,) = self.kept[name].axes
        return axes


def line_of(axes: Axes, label: str) -> Any:
    return next(line for line in axes.lines if str(line.get_label()).startswith(label))


def fit(
    folder: Path, learning_rate: float, *callbacks: Any, num_features: int = 1, epochs: int = 12, batch_size: int = 1000
) -> tuple[LinearRegression, TableData]:
    torch.manual_seed(0)
    data = SyntheticData(60, num_features, 0.3, 4.0, seed=0, batch_size=batch_size)
    data.setup("fit")
    module = LinearRegression(
        num_features,
        lambda parameters: torch.optim.SGD(parameters, lr=learning_rate),
        {"scheduler": None, "interval": "epoch", "monitor": "val/loss"},
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoard(str(folder)),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return module, data


def weights(module: LinearRegression) -> "np.typing.NDArray[np.float64]":
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double().numpy()


def test_two_parameters_are_drawn_over_weight_and_bias_from_start_to_end(tmp_path: Path) -> None:
    pictures = Kept(str(tmp_path))
    module, data = fit(tmp_path, 0.3, pictures)
    axes = pictures.axes("loss_surface")
    features, target = (part.double().numpy() for part in data.parts["train"])
    optimum = np.polyfit(features[:, 0], target, 1)  # another library's line: slope, intercept
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("weight", "bias")
    path = line_of(axes, "descent").get_xydata()
    assert len(path) == 13
    np.testing.assert_array_equal(path[-1], weights(module))
    np.testing.assert_array_equal(line_of(axes, "end").get_xydata()[0], weights(module))
    np.testing.assert_allclose(line_of(axes, "optimum").get_xydata()[0], optimum, atol=1e-9)


def test_more_parameters_are_drawn_on_the_plane_of_the_extreme_eigenvectors(tmp_path: Path) -> None:
    pictures = Kept(str(tmp_path))
    module, data = fit(tmp_path, 0.3, pictures, num_features=3)
    features, target = (part.double().numpy() for part in data.parts["train"])
    design = np.column_stack([features, np.ones(len(features))])
    optimum = np.linalg.lstsq(design, target, rcond=None)[0]
    _, _, directions = np.linalg.svd(design)  # right singular vectors, the steepest first
    axes = pictures.axes("loss_surface")
    end = line_of(axes, "descent").get_xydata()[-1]
    expected = np.abs(directions[[0, -1]] @ (weights(module) - optimum))
    np.testing.assert_allclose(np.abs(end), expected, atol=1e-9)
    assert axes.get_xlabel() == "along the steepest direction"
    assert axes.get_ylabel() == "along the flattest direction"


def test_the_png_files_and_tensorboards_images_are_the_same_and_no_bit_of_training_differs(tmp_path: Path) -> None:
    drawn, _ = fit(tmp_path, 0.3, Pictures(str(tmp_path), every_n_steps=5))
    bare, _ = fit(tmp_path / "without", 0.3)
    np.testing.assert_array_equal(weights(drawn), weights(bare))
    events = read_events(tmp_path)
    for name in ("loss_surface", "step_along_gradient"):
        with Image.open(tmp_path / f"{name}_{tmp_path.name}_lr=0.3.png") as image:
            assert image.size == (1050, 750)
            assert (np.asarray(image.convert("RGB")) == RED_PIXEL).all(axis=-1).sum() > 50
        logged = events.Images(f"pictures/{name}")
        assert [each.step for each in logged] == [5, 10, 12]
        assert (logged[-1].width, logged[-1].height) == (1050, 750)


def test_tensorboard_is_shown_ever_fewer_and_the_last(tmp_path: Path) -> None:
    fit(tmp_path, 0.3, Pictures(str(tmp_path), every_n_steps=2))
    assert [each.step for each in read_events(tmp_path).Images("pictures/loss_surface")] == [2, 4, 8, 12]


@pytest.mark.parametrize(("share", "name"), [(0.01, "too short"), (0.9, "overshoot"), (1.2, "overshoot, uphill")])
def test_the_step_is_marked_where_the_loss_really_went(tmp_path: Path, share: float, name: str) -> None:
    pictures = Kept(str(tmp_path))
    torch.manual_seed(0)
    limit = 2 / sharpness()
    module, data = fit(tmp_path, share * limit, pictures, epochs=20)
    axes = pictures.axes("step_along_gradient")
    rate, loss = line_of(axes, "taken").get_xydata()[0]
    features, target = data.parts["train"]
    with torch.no_grad():
        assert loss == pytest.approx(float(module.loss((features, target))), rel=1e-4)
    assert rate == pytest.approx(share * limit, rel=1e-3)
    assert axes.get_title(loc="left").strip() == f"Step 19: {name} along its gradient"
    assert axes.get_xlabel().startswith("learning rate")
    assert axes.get_ylabel() == "training loss after the step"


def test_a_lines_step_on_a_batch_is_drawn_along_the_gradient_of_that_batch(tmp_path: Path) -> None:
    pictures = Kept(str(tmp_path))
    fit(tmp_path, 0.03, pictures, epochs=4, batch_size=16)
    axes = pictures.axes("step_along_gradient")
    assert line_of(axes, "taken").get_xydata()[0][0] == pytest.approx(0.03, rel=1e-4)  # the rate itself
    assert axes.get_ylabel() == "loss of the batch after the step"
    assert any("0.03 × the gradient of its batch" in text.get_text() for text in axes.texts)
    assert any(text.get_text().endswith("lr=0.03") for text in pictures.kept["step_along_gradient"].texts)


def sharpness() -> float:
    data = SyntheticData(60, 1, 0.3, 4.0, seed=0, batch_size=1000)
    data.setup("fit")
    design = np.column_stack([data.parts["train"][0].double().numpy(), np.ones(len(data.parts["train"][1]))])
    return float(2 * np.linalg.norm(design, 2) ** 2 / len(design))


@pytest.mark.filterwarnings("ignore:Diverged:UserWarning")  # what the recorder has to say
def test_a_path_that_runs_away_shows_its_growing_zig_zag(tmp_path: Path) -> None:
    pictures = Kept(str(tmp_path))
    fit(tmp_path, 1.2 * 2 / sharpness(), pictures, FlightRecorder(folder=str(tmp_path)), epochs=100)
    axes = pictures.axes("loss_surface")
    path = line_of(axes, "descent").get_xydata()
    inside = [
        axes.get_xlim()[0] <= x <= axes.get_xlim()[1] and axes.get_ylim()[0] <= y <= axes.get_ylim()[1] for x, y in path
    ]
    assert sum(inside) >= 4
    assert "runs away" in axes.get_title(loc="left")


def test_the_path_is_bounded_in_bytes_and_keeps_both_sides_of_a_zig_zag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downslope.callbacks.pictures, "PATH_BYTES", 10 * 2 * 4)  # ten places of two float32 each
    pictures = Kept(str(tmp_path))
    fit(tmp_path, 0.99 * 2 / sharpness(), pictures, epochs=40)
    path = line_of(pictures.axes("loss_surface"), "descent").get_xydata()
    assert 4 <= len(path) <= 11
    steps = np.diff(path[:-1], axis=0)
    assert (np.einsum("ij,ij->i", steps[1:], steps[:-1]) < 0).all()


def test_a_folder_that_cannot_be_written_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        module, _ = fit(tmp_path, 0.3, Pictures(str(tmp_path / "file"), every_n_steps=1))
    assert module.trainer.global_step == 12
    assert sum("Pictures is off" in record.message for record in caplog.records) == 1


class Operations(TorchDispatchMode):
    """Remembers every operation on tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_step_costs_one_copy_and_never_waits_for_the_device(tmp_path: Path) -> None:
    operations = Operations()

    class Watched(Pictures):
        def _before(self, step: OptimizerStep) -> None:
            with operations:
                super()._before(step)

    fit(tmp_path, 0.3, Watched(str(tmp_path)), epochs=3)
    assert operations.names  # `.item()`, `.cpu()`, `.double()` would show as _local_scalar_dense and _to_copy
    assert operations.names <= {"aten::_foreach_clone", "aten::clone", "aten::detach"}


class Network(LightningModule):
    """Somebody else's: a square of a masked line, which is a quadratic for the mask of the moment."""

    def __init__(self, rows: "tuple[Tensor, Tensor]", manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.line, self.dropout = nn.Linear(6, 1), nn.Dropout(0.5)
        self.rows, self.automatic_optimization = rows, not manual
        self.masks: list[Tensor] = []
        self.places: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        return self.loss_and_features(batch)[0]

    def loss_and_features(self, batch: Any) -> "tuple[Tensor, Tensor]":
        features = self.dropout(batch[0])
        return (self.line(features).squeeze(-1) - batch[1]).square().mean(), features

    def training_step(self, batch: Any) -> Tensor:
        loss, features = self.loss_and_features(batch)
        self.masks.append(features.detach().clone())
        self.places.append(torch.cat([p.detach().flatten() for p in self.parameters()]))
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Foreign(Network):
    loss = None


def fit_network(
    *callbacks: Any, kind: type[Network] = Network, manual: bool = False, zero: bool = False, accumulate: int = 1
) -> Network:
    torch.manual_seed(0)
    features = torch.randn(32, 6)
    rows = (features, 0 * features[:, 0] if zero else features.sum(1) + 1)
    module = kind(rows, manual)
    if zero:
        nn.init.zeros_(module.line.weight)
        nn.init.zeros_(module.line.bias)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*rows), batch_size=16))
    return module


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:The number of training batches")
class TestOfSomebodyElsesModule:
    """No closed form: the loss of the batch, evaluated along its gradient."""

    @pytest.mark.parametrize("manual", [False, True])
    def test_the_step_is_drawn_on_the_loss_that_it_was_taken_on(self, tmp_path: Path, manual: bool) -> None:
        pictures = Kept(str(tmp_path))
        module = fit_network(pictures, manual=manual)
        axes = pictures.axes("step_along_gradient")
        # By hand, of the last of six batches: the dropped features are those of its own forward.
        design = np.column_stack([module.masks[5].double().numpy(), np.ones(16)])
        target = module.rows[1][16:].double().numpy()
        place = module.places[5].double().numpy()
        gradient = 2 * design.T @ (design @ place - target) / 16
        curvature = 2 * np.square(design @ gradient).mean() / np.square(gradient).sum()
        rate, loss = line_of(axes, "taken").get_xydata()[0]
        assert rate == pytest.approx(0.1, rel=1e-4)
        assert loss == pytest.approx(np.square(design @ (place - 0.1 * gradient) - target).mean(), rel=1e-5)
        best = float(axes.texts[0].get_text().removeprefix("best = "))
        assert best == pytest.approx(1 / curvature, rel=1e-2)  # three digits are written
        assert axes.get_ylabel() == "loss of the batch after the step"
        assert list(tmp_path.glob("step_along_gradient_*.png"))
        assert not list(tmp_path.glob("loss_surface*.png"))

    def test_training_is_the_same_to_the_bit(self, tmp_path: Path) -> None:
        drawn, bare = fit_network(Pictures(str(tmp_path), every_n_steps=2)), fit_network()
        assert len(drawn.masks) == len(bare.masks) == 6  # what an evaluation leaves stays in its copy
        for one, other in zip(drawn.masks, bare.masks, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(drawn.parameters(), bare.parameters(), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize(
        ("setting", "reason"),
        [
            ({"kind": Foreign}, "Foreign has no method `loss(batch)`: add one, or give the callback `loss=`"),
            ({"accumulate": 2}, "gradients are accumulated"),
            ({"zero": True}, "the gradient is zero"),
        ],
    )
    def test_one_line_says_why_there_is_none(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: dict[str, Any], reason: str
    ) -> None:
        with caplog.at_level(logging.WARNING):
            fit_network(Pictures(str(tmp_path), every_n_steps=2), **setting)
        (line,) = [each.message for each in caplog.records if "pictures/step_along_gradient" in each.message]
        assert reason in line
        assert not list(tmp_path.glob("*.png"))


def test_a_sound_step_along_the_flattest_direction_is_not_called_too_short() -> None:
    # η = ½ × the largest stable rate, and 1/25 of the best along this gradient; a hundredth of it is too short indeed.
    assert name_step(0.04, 0.1, 0.2, uphill=False) == "0.04 × the best"
    assert name_step(0.04, 0.001, 0.2, uphill=False) == "too short"
    assert name_step(0.04, 0.1, None, uphill=False) == "0.04 × the best"
