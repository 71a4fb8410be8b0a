"""Maps where a small network learns and where it diverges, over two hyperparameters: a pixel is a network of its own.

python scripts/trainability_map.py                             the rates of the two layers, 256 × 256
python scripts/trainability_map.py --x rate --y momentum --size 512
python scripts/trainability_map.py --zoom 0.5 2 3 8            this part alone: x from 0.5 to 2, y from 3 to 8

16 inputs, 16 tanh units, one output; 16 random rows with random targets; full batches and plain gradient descent. All
networks begin with the same weights. After Sohl-Dickstein (2024), "The boundary of neural network trainability is
fractal".
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from downslope.pictures.style import new_figure, paint, png
from downslope.runs.console import refusing
from downslope.sweeps.stacked import StackedOptimizer

WIDTH, ROWS, LAST = 16, 16, 20
AT_ONCE = 2048  # networks: their weights stay in the processor's cache
RANGES = {"rate": (0.01, 10.0), "rate_1": (0.1, 1000.0), "rate_2": (0.01, 10.0), "momentum": (0.0, 0.99),
          "batch_size": (1.0, float(ROWS))}  # fmt: skip
LOGARITHMIC = ("rate", "rate_1", "rate_2", "batch_size")


def values_of(name: str, size: int, ends: Sequence[float] | None = None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns an axis: so many values between two ends."""
    low, high = ends or RANGES[name]
    if not 0 <= low < high or (name in LOGARITHMIC and low == 0) or (name == "momentum" and high >= 1):
        raise ValueError(f"`--zoom` must name a part of {name} that rises, got {low:g} to {high:g}.")
    return np.geomspace(low, high, size) if name in LOGARITHMIC else np.linspace(low, high, size)


def train(axes: dict[str, Tensor], steps: int, seed: int) -> tuple[Any, Any]:
    """Trains networks that differ in some hyperparameters, all at once.

    Args:
        axes: A value for each network, by the hyperparameter's name.
        steps: Of each.
        seed: Of the weights, of the rows, and of their order.

    Returns:
        The mean of the last losses over the first one, and the steps taken before it diverged, as arrays.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(WIDTH, columns, generator=generator) / WIDTH**0.5 for columns in (WIDTH, 1))
    features, target = (torch.randn(ROWS, columns, generator=generator) for columns in (WIDTH, 1))
    num = len(next(iter(axes.values())))
    layers = [nn.Parameter(each.repeat(num, 1, 1)) for each in (first, second)]
    rate = axes.get("rate", torch.ones(num, dtype=torch.float64))
    rates = [axes.get("rate_1", rate), axes.get("rate_2", rate)]
    groups = [{"params": [layer], "lr": each} for layer, each in zip(layers, rates, strict=True)]
    momentum = axes.get("momentum", torch.zeros(num, dtype=torch.float64))
    optimizer = StackedOptimizer(groups, SGD, {"momentum": momentum})
    last, beginning = torch.zeros(num), torch.ones(num)
    for step in range(steps):
        order = torch.randperm(ROWS, generator=generator)

        def closure(order: Tensor = order) -> Tensor:
            optimizer.zero_grad()
            errors = ((features @ layers[0]).tanh() @ layers[1] - target)[..., 0].square()
            losses = errors.mean(1)
            if "batch_size" in axes:  # the first rows of this step's order
                sizes = axes["batch_size"].round().clamp(1, ROWS)[optimizer.alive]
                chosen = (order.argsort() < sizes[:, None]).to(errors.dtype)
                losses = (errors * chosen).sum(1) / chosen.sum(1)
            losses.sum().backward()
            return losses

        alive = optimizer.alive
        losses = optimizer.step(closure)
        if step == 0:
            beginning[alive] = losses
        if step >= steps - LAST:
            last[alive] += losses / LAST
    return (last / beginning).numpy(), optimizer.num_steps.numpy()


def draw(relative: Any, num_steps: Any, steps: int, x: Any, y: Any, names: Sequence[str]) -> bytes:
    """Draws what learned in blue, the darker the further; what diverged in red, the darker the sooner."""
    figure = new_figure(7.4, 6.4, layout="constrained")
    axes = figure.add_subplot()
    diverged = num_steps < steps
    learned = np.where(diverged, np.nan, np.log10(np.clip(relative, 1e-6, 1.0)))
    soon = np.where(diverged, np.log10(1.0 + num_steps), np.nan)
    axes.pcolormesh(x, y, soon, cmap="Reds_r", shading="nearest", vmin=-1.0, vmax=np.log10(steps) + 0.5)
    colours = axes.pcolormesh(x, y, learned, cmap="Blues_r", shading="nearest", vmax=0.5)
    figure.colorbar(
        colours, ax=axes, label="log₁₀ of the last loss over the first (red: diverged, the darker the sooner)"
    )
    for name, axis in zip(names, "xy", strict=True):
        axes.set(**{f"{axis}label": name.replace("_", " "), f"{axis}scale": "log" if name in LOGARITHMIC else "linear"})
    paint(axes)
    axes.grid(visible=False)
    axes.set_title(f"{diverged.mean():.0%} of {diverged.size:,} networks diverge", loc="left", fontweight="bold")
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, draws, and writes the array beside the picture."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=examples, formatter_class=raw)
    parser.add_argument("--x", choices=RANGES, default="rate_1", help="the horizontal axis")
    parser.add_argument("--y", choices=RANGES, default="rate_2", help="the vertical one")
    parser.add_argument("--size", type=int, default=256, help="networks along each axis (256)")
    parser.add_argument("--zoom", type=float, nargs=4, metavar=("X0", "X1", "Y0", "Y1"), help="a part of the map")
    parser.add_argument("--steps", type=int, default=500, help="of each network (500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/map"), help="name of the files, without .png and .npz"
    )
    told = parser.parse_args(arguments)
    if told.x == told.y:
        raise ValueError(f"`--x` and `--y` must be two hyperparameters, got {told.x} twice.")
    if not (2 <= told.size <= 4096 and told.steps >= LAST):
        raise ValueError(f"`--size` must be from 2 to 4096 and `--steps` at least {LAST}.")
    zoom = told.zoom or [None] * 4
    x, y = (values_of(name, told.size, ends if ends[0] is not None else None)
            for name, ends in ((told.x, zoom[:2]), (told.y, zoom[2:])))  # fmt: skip
    relative, num_steps = _map({told.x: x, told.y: y}, told.steps, told.seed)
    told.out.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"x": x, "y": y, "relative_loss": relative, "num_steps": num_steps}
    np.savez_compressed(told.out.with_suffix(".npz"), **arrays)
    told.out.with_suffix(".png").write_bytes(draw(relative, num_steps, told.steps, x, y, (told.x, told.y)))
    print(f"{told.out.with_suffix('.png')}\n{told.out.with_suffix('.npz')}: {', '.join(arrays)}")


def _map(axes: dict[str, Any], steps: int, seed: int) -> tuple[Any, Any]:
    from rich.progress import track

    (x_name, x), (y_name, y) = axes.items()
    columns, rows = (torch.from_numpy(each.ravel()) for each in np.meshgrid(x, y))
    pairs = zip(columns.split(AT_ONCE), rows.split(AT_ONCE), strict=True)
    parts = [{x_name: one, y_name: other} for one, other in pairs]
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(parts)), context, torch.set_num_threads, (1,)) as pool:
        trained = pool.map(train, parts, repeat(steps), repeat(seed))
        found = list(track(trained, f"{len(columns):,} networks", len(parts)))
    relative, num_steps = (np.concatenate(each).reshape(len(y), len(x)) for each in zip(*found, strict=True))
    return relative, num_steps


if __name__ == "__main__":
    with refusing("trainability_map"):
        main()
