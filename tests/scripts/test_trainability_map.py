"""The map's networks are those that a plain loop trains, one at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trainability_map
from torch import Tensor, nn
from trainability_map import LAST, ROWS, WIDTH, train

STEPS = 60


def alone(rate_1: float, rate_2: float, momentum: float, batch_size: int, steps: int) -> tuple[float, int]:
    """The mean of the last losses over the first, and the steps before the loss exceeds a million times the first."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(WIDTH, columns, generator=generator) / WIDTH**0.5 for columns in (WIDTH, 1))
    features, target = (torch.randn(ROWS, columns, generator=generator) for columns in (WIDTH, 1))
    layers = [nn.Parameter(first), nn.Parameter(second)]
    groups = [{"params": [layer], "lr": rate} for layer, rate in zip(layers, (rate_1, rate_2), strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=momentum)
    losses = []
    for step in range(steps):
        rows = torch.randperm(ROWS, generator=generator).argsort() < batch_size
        loss: Tensor = nn.functional.mse_loss((features[rows] @ layers[0]).tanh() @ layers[1], target[rows])
        losses.append(loss.item())
        if not losses[-1] <= 1e6 * losses[0]:
            return float("nan"), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(np.mean(losses[-LAST:])) / losses[0], steps


@pytest.mark.parametrize(
    "axes",
    [
        {"rate_1": [0.1, 1.0, 2.0, 5.0], "rate_2": [0.01, 0.1, 5.0, 0.05]},
        {"rate": [0.01, 0.1, 0.2, 5.0], "momentum": [0.9, 0.0, 0.5, 0.1]},
        {"rate": [0.01, 0.1, 0.05, 5.0], "batch_size": [1.0, 4.0, 15.6, 16.0]},
    ],
)
def test_every_network_is_the_one_that_is_trained_alone(axes: dict[str, list[float]]) -> None:
    relative, num_steps = train(
        {name: torch.tensor(each, dtype=torch.float64) for name, each in axes.items()}, STEPS, 3
    )
    for index in range(4):
        told = {name: each[index] for name, each in axes.items()}
        rates = told.get("rate_1", told.get("rate", 0.0)), told.get("rate_2", told.get("rate", 0.0))
        loss, steps = alone(*rates, told.get("momentum", 0.0), round(told.get("batch_size", ROWS)), STEPS)
        assert int(num_steps[index]) == steps
        if steps == STEPS:
            assert float(relative[index]) == pytest.approx(loss, rel=1e-4)


def test_the_picture_and_the_array_lie_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "map"
    trainability_map.main(["--size", "6", "--steps", "30", "--zoom", "0.5", "2", "0.1", "8", "--out", str(file)])
    arrays = np.load(file.with_suffix(".npz"))
    assert arrays["relative_loss"].shape == arrays["num_steps"].shape == (6, 6)
    assert arrays["x"][[0, -1]] == pytest.approx([0.5, 2.0])
    assert (arrays["num_steps"][-1] < 30).all()  # a rate of 8 diverges
    assert (arrays["num_steps"][0] == 30).all()
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(file.with_suffix(".png")) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--x", "rate", "--y", "rate"], "two hyperparameters, got rate twice"),
        (["--size", "1"], "`--size` must be from 2 to 4096"),
        (["--zoom", "0", "1", "0.1", "1"], "a part of rate_1 that rises, got 0 to 1"),
    ],
)
def test_an_impossible_map_is_refused(typed: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainability_map.main(typed)
