"""What a learning rate and a mistake look like: docs/index.html and docs/descent.gif, from real runs (make docs)."""

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from tqdm import tqdm

from downslope.pictures.style import GREEN, INK, QUIET, RED, new_figure, paint

ROOT = Path(__file__).parents[2]
RATES = ["too_slow", "just_right", "edge", "diverge"]
MISTAKES = [
    "unscaled_features",
    "missing_zero_grad",
    "unnormalised_accumulation",
    "detached_graph",
    "frozen_parameter",
    "dead_relu",
]
SHARES = {"too small": 0.03, "right": 0.5, "too large": 1.03}  # of 2/λ
NUM_FRAMES = 48
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 380, 200, 60, 8, 26  # of a curve, in pixels


@dataclass
class Shown:
    """A run, and what there is to see of it."""

    name: str
    about: str
    command: str
    verdict: str
    sentence: str
    loss: str
    norm: str


def shown(experiment: str, folder: Path) -> Shown:
    """Runs an experiment as a person would."""
    command = ["scripts/train.py", f"experiment={experiment}"]
    quiet = [
        "+trainer.enable_progress_bar=false",
        "callbacks.gradient_monitor.every_n_steps=1",
        f"hydra.run.dir={folder / experiment}",
    ]
    ended = subprocess.run([sys.executable, *command, *quiet], cwd=ROOT, capture_output=True, text=True)
    if ended.returncode not in (0, 3):
        raise RuntimeError(f"experiment={experiment} failed: {ended.stderr}")
    result = json.loads((folder / experiment / "result.json").read_text())
    events = EventAccumulator(str(folder / experiment)).Reload()
    known = set(events.Tags()["scalars"])
    tags = ("train/loss", "gradient_norm/total")
    curves = [[(each.step, each.value) for each in events.Scalars(tag)] if tag in known else [] for tag in tags]
    first = (ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text().splitlines()[1]
    sentence = result["evidence"].get("sentence", "")
    loss, norm = (svg(curve) for curve in curves)
    return Shown(
        experiment, first.removeprefix("# "), f"python {' '.join(command)}", result["verdict"], sentence, loss, norm
    )


def svg(curve: Sequence[tuple[int, float]]) -> str:
    """Draws values against steps on a logarithmic axis; a value of 0, or none, is a gap.

    Example:
        >>> svg([(0, 1.0), (1, 10.0)]).count("<polyline")
        1
    """
    points = [(step, value) for step, value in curve if 0 < value < float("inf")]
    if not points:
        return "<p class='quiet'>There is none.</p>"
    values = torch.tensor([value for _, value in points], dtype=torch.float64).log10()
    low, high = float(values.min()), float(values.max())
    low, high = (low - 0.5, high + 0.5) if high - low < 0.1 else (low, high)
    last = max(points[-1][0], 1)
    places = [
        (
            LEFT + (WIDTH - LEFT - 8) * step / last,
            TOP + (HEIGHT - TOP - BOTTOM) * (high - float(value)) / (high - low),
        )
        for (step, _), value in zip(points, values, strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in places[:: max(1, len(places) // 40)])
    marks = "".join(
        f'<text x="{LEFT - 6}" y="{y}" text-anchor="end">{10**power:.3g}</text>'
        for power, y in ((high, TOP + 9), (low, HEIGHT - BOTTOM))
    )
    ends = f'<text x="{LEFT}" y="{HEIGHT - 8}">step 0</text>'
    ends += f'<text x="{WIDTH - 8}" y="{HEIGHT - 8}" text-anchor="end">{last:,}</text>'
    axes = f'<path d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - 8}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{axes}<polyline points="{line}"/>{dots}{marks}{ends}</svg>'


def bowl() -> tuple[Tensor, Tensor]:
    """Returns Hessian and optimum of the loss over the weights of two features of the diabetes table, s4 and s5."""
    header, *lines = (ROOT / "src" / "template" / "regression" / "diabetes.csv").read_text().splitlines()
    rows = torch.tensor([[float(cell) for cell in line.split(",")] for line in lines], dtype=torch.float64)
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
    columns = header.split(",")
    features = rows[:, [columns.index("s4"), columns.index("s5")]]
    target = rows[:, columns.index("progression")]
    return 2 * features.T @ features / len(rows), torch.linalg.lstsq(features, target[:, None]).solution[:, 0]


def frames(hessian: Tensor, optimum: Tensor) -> Iterator[Image.Image]:
    """Draws gradient descent on that bowl, θ ← θ − η H(θ − θ*), from the same start at three rates; a frame a step."""
    edge = 2 / float(torch.linalg.eigvalsh(hessian)[-1])
    start = optimum + torch.tensor([-0.75, 0.95], dtype=torch.float64)
    paths = {}
    for name, share in SHARES.items():
        points = [start]
        for _ in range(NUM_FRAMES):
            points.append(points[-1] - share * edge * hessian @ (points[-1] - optimum))
        paths[name] = torch.stack(points)
    x, y = torch.meshgrid(*(torch.linspace(float(c) - 1.5, float(c) + 1.5, 120) for c in optimum), indexing="xy")
    offset = torch.stack([x, y], dim=-1).double() - optimum
    root = torch.einsum("...i,ij,...j->...", offset, hessian, offset).div(2).sqrt()
    for step in [*range(NUM_FRAMES + 1), *[NUM_FRAMES] * 12]:
        figure = new_figure(9.0, 3.3)
        for index, (name, path) in enumerate(paths.items()):
            axes = figure.add_axes((0.01 + index * 0.333, 0.02, 0.315, 0.83))
            paint(axes)
            axes.grid(visible=False)
            axes.contourf(x, y, root, levels=12, cmap="Blues", alpha=0.75)
            axes.contour(x, y, root, levels=12, colors="white", linewidths=0.6)
            axes.plot(*path[: step + 1].T, color=RED, linewidth=1.2, marker="o", markersize=3.2)
            axes.plot(*path[step], color=RED, marker="o", markersize=8, markeredgecolor=INK)
            axes.plot(*optimum, color=GREEN, marker="*", markersize=15, markeredgecolor="white")
            axes.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), xticks=[], yticks=[])
            axes.set_title(name, loc="left", fontsize=13, fontweight="bold", color=INK)
            axes.text(
                1, 1.03, f"{SHARES[name]:g} × 2/λ", transform=axes.transAxes, fontsize=10, color=QUIET, ha="right"
            )
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=100)
        yield Image.open(content).convert("RGB")


def animate(file: Path) -> None:
    """Writes the descent at three rates as a GIF that runs for ever."""
    drawn = list(tqdm(frames(*bowl()), total=NUM_FRAMES + 13, desc=file.name))
    palette = drawn[-1].quantize(96)
    pictures = [each.quantize(palette=palette, dither=Image.Dither.NONE) for each in drawn]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=110, loop=0, optimize=True)


def main() -> None:
    """Writes both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where index.html and descent.gif go")
    parser.add_argument("--only", nargs="*", default=[*RATES, *MISTAKES], help="these experiments alone")
    arguments = parser.parse_args()
    animate(arguments.folder / "descent.gif")
    with tempfile.TemporaryDirectory() as folder:
        runs = [shown(name, Path(folder)) for name in tqdm(arguments.only, desc="runs")]
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    rates, mistakes = ([run for run in runs if run.name in names] for names in (RATES, MISTAKES))
    page = pages.get_template("gallery.html").render(rates=rates, mistakes=mistakes)
    (arguments.folder / "index.html").write_text(re.sub(r"\n\s*\n", "\n", page), encoding="utf-8")


if __name__ == "__main__":
    main()
