"""Each planted mistake shows its own symptom, in gradients computed by hand; each experiment is at the rate it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer

from downslope.data import DataModule
from downslope.models import mistakes
from downslope.models.manual import ManualLinearRegression
from tests.conftest import ROOT, read_json

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


def diabetes(standardize: bool = True) -> DataModule:
    data = DataModule.from_file(
        "pkg://downslope.data/diabetes.csv", "progression", seed=0, batch_size=354, standardize=standardize
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


@pytest.mark.filterwarnings("ignore:Diverged:UserWarning")  # what the recorder has to say
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_and_ends_with_its_exit_code(script: Any, tmp_path: Path, name: str) -> None:
    ended = script("train", f"experiment={name}", "hydra.run.dir=run", "callbacks=default", "device=cpu")
    assert ended.code == EXPERIMENTS[name][1], ended.err
    result = read_json(tmp_path / "run")
    assert result["status"] == ("diverged" if ended.code else "completed")
    assert (tmp_path / "run" / "loss_surface.png").exists() == (name != "dead_relu")
