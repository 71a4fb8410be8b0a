"""Each planted mistake shows its own symptom, in gradients computed by hand; each experiment is at the rate it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer

from template.regression import mistakes
from template.regression.data import TableData
from template.regression.manual import ManualLinearRegression
from tests.conftest import ROOT, read_json, scalars

RATE = 0.02
NUM_STEPS = 5
EXPERIMENTS = {
    "diverge": (1.1, 3),
    "edge": (0.99, 0),
    "too_slow": (0.001, 0),
    "just_right": (0.5, 0),
    "unscaled_features": (0.5, 0),
    "missing_zero_grad": (0.1, 0),
    "detached_graph": (0.5, 0),
    "frozen_parameter": (0.5, 0),
    "unnormalised_accumulation": (0.5, 3),
    "dead_relu": (0.5, 0),
}


def diabetes(standardize: bool = True) -> TableData:
    data = TableData(
        "pkg://template.regression/diabetes.csv", "progression", seed=0, batch_size=354, standardize=standardize
    )
    data.setup("fit")
    return data


def watch(mistake: type[ManualLinearRegression]) -> tuple[ManualLinearRegression, list[Any], list[Any]]:
    """Trains on full batches; returns the weights before each step, and what then lay in .grad."""
    torch.manual_seed(0)
    module = mistake(
        10,
        lambda parameters: torch.optim.SGD(parameters, lr=RATE),
        {"scheduler": None, "interval": "epoch", "monitor": ""},
    )
    places: list[Any] = []
    gradients: list[Any] = []

    def see(*_: object) -> None:
        places.append([p.detach().double().numpy().copy() for p in module.parameters()])
        gradients.append([None if p.grad is None else p.grad.double().numpy().copy() for p in module.parameters()])

    trainer = Trainer(
        max_epochs=NUM_STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    make = module.make_optimizer

    def watched(parameters: Any) -> Any:
        optimizer = make(parameters)
        optimizer.register_step_pre_hook(see)
        return optimizer

    module.make_optimizer = watched
    trainer.fit(module, datamodule=diabetes())
    return module, places, gradients


def by_hand(place: Any) -> Any:
    """The gradient of the mean squared error over all rows, written out."""
    features, target = (part.double().numpy() for part in diabetes().parts["train"])
    weight, bias = place
    residual = features @ weight[0] + bias - target
    return [2 * (residual @ features)[None] / len(target), np.array([2 * residual.mean()])]


def test_without_zero_grad_the_gradient_is_the_sum_of_all_before() -> None:
    _, places, gradients = watch(mistakes.MissingZeroGrad)
    total = [0.0, 0.0]
    for place, gradient in zip(places, gradients, strict=True):
        total = [sum_ + each for sum_, each in zip(total, by_hand(place), strict=True)]
        for expected, got in zip(total, gradient, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_detached_graph_leaves_no_gradient_and_moves_nothing() -> None:
    _, places, gradients = watch(mistakes.DetachedGraph)
    assert all(gradient is None for step in gradients for gradient in step)
    for first, last in zip(places[0], places[-1], strict=True):
        np.testing.assert_array_equal(first, last)


def test_a_frozen_weight_stays_and_the_bias_learns() -> None:
    _, places, gradients = watch(mistakes.FrozenParameter)
    np.testing.assert_array_equal(places[0][0], places[-1][0])
    assert all(gradient[0] is None for gradient in gradients)
    assert places[0][1] != places[-1][1]


def test_an_unnormalised_accumulation_is_its_number_of_parts_times_the_mean() -> None:
    _, places, gradients = watch(mistakes.UnnormalisedAccumulation)
    for place, gradient in zip(places, gradients, strict=True):  # 354 rows are six times 59
        for expected, got in zip(by_hand(place), gradient, strict=True):
            np.testing.assert_allclose(got, 6 * expected, rtol=1e-4, atol=1e-4)


def test_a_dead_layer_gets_gradients_of_exactly_zero() -> None:
    module, places, gradients = watch(mistakes.DeadReLU)
    names = [name for name, _ in module.named_parameters()]
    for gradient in gradients:
        zero = {name for name, each in zip(names, gradient, strict=True) if not each.any()}
        assert zero == {"hidden.weight", "hidden.bias", "linear.weight"}
    assert places[0][names.index("linear.bias")] != places[-1][names.index("linear.bias")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_at_the_multiple_of_the_limit_that_it_says(name: str) -> None:
    config = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())
    features = diabetes(name != "unscaled_features").parts["train"][0].double().numpy()
    design = np.column_stack([features, np.ones(len(features))])
    limit = len(design) / np.linalg.norm(design, 2) ** 2  # 2/λ with λ = 2σ²/N
    assert config["lr"] == pytest.approx(EXPERIMENTS[name][0] * limit, rel=1e-3)
    assert config["data"]["batch_size"] >= len(design)


def descend(config: Any, num_steps: int) -> tuple[Any, list[Any], list[Any], list[float]]:
    """Gradient descent on all rows in float64 from the run's first weights: the design, places, gradients, losses."""
    features, target = (
        part.double().numpy() for part in diabetes(config["data"].get("standardize", True)).parts["train"]
    )
    design = np.column_stack([features, np.ones(len(features))])
    torch.manual_seed(0)
    first = torch.nn.Linear(10, 1)
    place = np.append(first.weight.detach().double().numpy(), first.bias.detach().double().numpy())
    places, gradients, losses = [], [], []
    for _ in range(num_steps + 1):
        residual = design @ place - target
        places.append(place)
        gradients.append(2 * design.T @ residual / len(target))
        losses.append(float(residual @ residual) / len(target))
        place = place - config["lr"] * gradients[-1]
    return (design, target), places, gradients, losses


def check_edge(rows: Any, places: Any, gradients: Any, losses: Any) -> None:
    one, other = gradients[-3:-1]
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) < -0.9  # from side to side
    assert (np.diff(losses) < 0).all()  # a little lower each time


def check_too_slow(rows: Any, places: Any, gradients: Any, losses: Any) -> None:
    least = np.linalg.lstsq(*rows, rcond=None)[1][0] / len(rows[1])
    assert (np.diff(losses) < 0).all()
    assert losses[-1] - least > 0.5 * (losses[0] - least)  # more than half of the way is still to go


def check_just_right(rows: Any, places: Any, gradients: Any, losses: Any) -> None:
    least = np.linalg.lstsq(*rows, rcond=None)[1][0] / len(rows[1])
    assert losses[-1] < 1.001 * least


def check_unscaled_features(rows: Any, places: Any, gradients: Any, losses: Any) -> None:
    optimum = np.linalg.lstsq(*rows, rcond=None)[0]
    directions = np.linalg.svd(rows[0], full_matrices=False)[2]  # the steepest first
    left = (directions @ (places[-1] - optimum)) / (directions @ (places[0] - optimum))
    assert abs(left[0]) < 1e-9  # solved in one step
    assert left[-1] > 0.999  # not begun


BEHAVIOURS = {
    "edge": check_edge,
    "too_slow": check_too_slow,
    "just_right": check_just_right,
    "unscaled_features": check_unscaled_features,
}


@pytest.mark.filterwarnings("ignore:Diverged:UserWarning")  # what the recorder has to say
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_behaves_as_it_says_and_ends_with_its_exit_code(
    script: Any, tmp_path: Path, name: str
) -> None:
    whole = name == "just_right" or EXPERIMENTS[name][1]
    short = () if whole else (f"trainer.max_epochs={40 if name in BEHAVIOURS else 10}",)
    ended = script("train", f"experiment={name}", "hydra.run.dir=run", "device=cpu", *short)
    assert ended.code == EXPERIMENTS[name][1], ended.err
    run = tmp_path / "run"
    result = read_json(run)
    assert result["status"] == ("diverged" if ended.code else "completed")
    assert list(run.glob("step_along_gradient_*.png"))
    is_line = name != "dead_relu"
    assert bool(list(run.glob("loss_surface_*.png"))) == is_line
    assert (result["largest_stable_learning_rate"] is not None) == is_line
    if is_line:
        (excess,), (tested,) = scalars(run, "train/excess_loss"), scalars(run, "test/loss")
        assert excess[0] == tested[0]
    if name in BEHAVIOURS:
        config = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())
        by_hand = descend(config, result["num_optimizer_steps"])
        last_loss = result["least_squares_loss"] + result["excess_loss"]
        assert last_loss == pytest.approx(by_hand[-1][-1], rel=1e-4)  # the run is in float32
        BEHAVIOURS[name](*by_hand)
