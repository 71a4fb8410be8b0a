"""The pictures that a run leaves, opened, and what is drawn on them held against the weights."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from downslope.callbacks import FlightRecorder, Pictures
from downslope.data import DataModule
from downslope.models import AutomaticLinearRegression
from downslope.tensorboard import TensorBoard
from tests.conftest import read_events

RED_PIXEL = (0xD5, 0x5E, 0x00)


class Kept(Pictures):
    """Keeps the last figures for the test to read."""

    def figures(self) -> "dict[str, Figure]":
        self.kept = super().figures()
        return self.kept

    def axes(self, name: str) -> Axes:
        (axes,) = self.kept[name].axes
        return axes


def line_of(axes: Axes, label: str) -> Any:
    return next(line for line in axes.lines if str(line.get_label()).startswith(label))


def fit(
    folder: Path, learning_rate: float, *callbacks: Any, num_features: int = 1, epochs: int = 12
) -> tuple[AutomaticLinearRegression, DataModule]:
    torch.manual_seed(0)
    data = DataModule.synthetic(60, num_features, 0.3, 4.0, seed=0, batch_size=1000)
    data.setup("fit")
    module = AutomaticLinearRegression(
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


def weights(module: AutomaticLinearRegression) -> "np.typing.NDArray[np.float64]":
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


def test_the_png_files_and_tensorboards_images_are_the_same_picture(tmp_path: Path) -> None:
    fit(tmp_path, 0.3, Pictures(str(tmp_path), every_n_steps=5))
    events = read_events(tmp_path)
    for name in ("loss_surface", "step_along_gradient"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (1050, 750)
            assert (np.asarray(image.convert("RGB")) == RED_PIXEL).all(axis=-1).sum() > 50
        logged = events.Images(f"pictures/{name}")
        assert [each.step for each in logged] == [5, 10, 12]
        assert (logged[-1].width, logged[-1].height) == (1050, 750)


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


def sharpness() -> float:
    data = DataModule.synthetic(60, 1, 0.3, 4.0, seed=0, batch_size=1000)
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


def test_the_path_is_bounded_and_keeps_both_sides_of_a_zig_zag(tmp_path: Path) -> None:
    pictures = Kept(str(tmp_path), num_points=10)
    fit(tmp_path, 0.99 * 2 / sharpness(), pictures, epochs=100)
    path = line_of(pictures.axes("loss_surface"), "descent").get_xydata()
    assert len(path) <= 11
    steps = np.diff(path[:-1], axis=0)
    assert (np.einsum("ij,ij->i", steps[1:], steps[:-1]) < 0).all()


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path: Path) -> None:
    drawn, _ = fit(tmp_path / "with", 0.3, Pictures(str(tmp_path), every_n_steps=1))
    bare, _ = fit(tmp_path / "without", 0.3)
    np.testing.assert_array_equal(weights(drawn), weights(bare))


def test_a_folder_that_cannot_be_written_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        module, _ = fit(tmp_path, 0.3, Pictures(str(tmp_path / "file"), every_n_steps=1))
    assert module.trainer.global_step == 12
    assert sum("Pictures are off" in record.message for record in caplog.records) == 1
