"""Compares four ways to a derivative: how exact, how expensive, and why the numeric one has a best step.

Prints the figures, and draws them to derivatives.png and to TensorBoard.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from derivatives import (
    METHODS,
    Function,
    MeanSquaredError,
    best_step,
    numeric,
    reverse_mode,
    symbolic_gradient,
)
from torch import Tensor

from downslope.runs.console import refusing, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_PARAMETERS = (1, 10, 100, 1_000, 10_000)
NUM_ROWS = 16
STEPS_PER_DECADE = 4
ENOUGH_SECONDS = 0.02  # a measurement that is shorter is repeated, and the shortest counts
COLORS = {"symbolic": "#009E73", "numeric": "#D55E00", "forward mode": "#0072B2", "reverse mode": "#000000"}
MARKERS = {"symbolic": "s", "numeric": "o", "forward mode": "^", "reverse mode": "D"}


@dataclass(frozen=True)
class Measurement:
    """One method at one number of parameters.

    Attributes:
        method: A name of `METHODS`.
        num_parameters: Length of the gradient.
        error: ‖g − g*‖ / ‖g*‖ of the gradient g in float32; g* is the same in float64, by reverse mode.
        seconds: The shortest time for one gradient.
    """

    method: str
    num_parameters: int
    error: float
    seconds: float


@dataclass(frozen=True)
class Valley:
    """The error of central differences against their step, in one precision.

    Attributes:
        dtype: The precision.
        steps: Relative steps, in ascending order.
        errors: ‖g − g*‖ / ‖g*‖ at each.
    """

    dtype: torch.dtype
    steps: list[float]
    errors: list[float]

    @property
    def best(self) -> tuple[float, float]:
        """The step with the least error, and that error."""
        error, step = min(zip(self.errors, self.steps, strict=True))
        return step, error

    @property
    def chosen(self) -> tuple[float, float]:
        """The step nearest to ε^(1/3), which `numeric` takes without looking, and its error."""
        wanted = best_step(self.dtype)
        return min(zip(self.steps, self.errors, strict=True), key=lambda pair: abs(pair[0] / wanted - 1))


def problem(num_parameters: int) -> tuple[MeanSquaredError, Tensor]:
    """Returns the loss of a line with so many parameters, bias included, and a place, in float64."""
    generator = torch.Generator().manual_seed(num_parameters)
    random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    loss = MeanSquaredError(random(NUM_ROWS, num_parameters - 1), random(NUM_ROWS))
    # Weights of size 1/√n keep predictions, and so the loss, of size 1 whatever the number of parameters.
    return loss, random(num_parameters) / num_parameters**0.5


def measure(num_parameters: int) -> list[Measurement]:
    """Takes the gradient of one problem in each way."""
    loss, place = problem(num_parameters)
    truth = reverse_mode(loss, place)
    single, single_place = MeanSquaredError(loss.features.float(), loss.target.float()), place.float()
    measurements = []
    for name, method in METHODS.items():
        gradient, seconds = timed(functools.partial(method, single, single_place))
        measurements.append(Measurement(name, num_parameters, relative_error(gradient, truth), seconds))
    return measurements


def timed(gradient: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Returns a gradient and the shortest time that it took: whatever else the machine does only adds."""
    fastest, spent = float("inf"), 0.0
    while spent < ENOUGH_SECONDS:
        started = time.perf_counter()
        result = gradient()
        seconds = time.perf_counter() - started
        fastest, spent = min(fastest, seconds), spent + seconds
    return result, fastest


def relative_error(gradient: Tensor, truth: Tensor) -> float:
    """Returns ‖g − g*‖ / ‖g*‖."""
    return float((gradient.double() - truth).norm() / truth.norm())


def neuron(features: Tensor, target: Tensor) -> Function:
    """The error of one tanh neuron: a line's has no third derivative, and so nothing to truncate."""
    line = MeanSquaredError(features, target)
    return lambda parameters: torch.nn.functional.mse_loss(torch.tanh(line.inputs @ parameters), target)


def valley(dtype: torch.dtype) -> Valley:
    """Measures the error of central differences from a step of 1 down to where nothing is left."""
    loss, place = problem(10)
    truth = reverse_mode(neuron(loss.features, loss.target), place)
    function = neuron(loss.features.to(dtype), loss.target.to(dtype))
    smallest = 2 * torch.finfo(dtype).eps  # below it, θ + h is θ
    steps = [10 ** (-power / STEPS_PER_DECADE) for power in range(20 * STEPS_PER_DECADE, -1, -1)]
    steps = [step for step in steps if step > smallest]
    errors = [relative_error(numeric(function, place.to(dtype), step), truth) for step in steps]
    return Valley(dtype, steps, errors)


def print_tables(measurements: list[Measurement], valleys: list[Valley]) -> None:
    """Prints what was measured, and what it means."""
    cells = {(each.method, each.num_parameters): each for each in measurements}
    sizes = sorted({each.num_parameters for each in measurements})
    say(f"The mean squared error of a line over {NUM_ROWS} rows, differentiated four ways, in float32.")
    say(f"SymPy derives, for every size at once: {symbolic_gradient()}")
    tables: list[tuple[str, Callable[[Measurement], str]]] = [
        ("error, relative to float64", lambda each: f"{each.error:.0e}"),
        ("milliseconds a gradient", lambda each: f"{1e3 * each.seconds:,.3f}"),
    ]
    for title, text in tables:
        say(f"\n{title:<28}" + "".join(f"{size:>11,}" for size in sizes) + "  parameters")
        for name in METHODS:
            say(f"  {name:<26}" + "".join(f"{text(cells[name, size]):>11}" for size in sizes))
    say("\ncentral differences          best step     error   ε^(1/3)     error")
    for each in valleys:
        (step, error), (chosen, chosen_error) = each.best, each.chosen
        precision = str(each.dtype).removeprefix("torch.")
        say(f"  {precision:<26}{step:>10.0e}{error:>10.0e}{chosen:>10.0e}{chosen_error:>10.0e}")
    say("\nA larger step bends away from the tangent (truncation, h²); a smaller one subtracts two nearly")
    say("equal numbers (rounding, ε/h). Numeric and forward mode take a pass for each parameter, reverse mode")
    say("one for all of them.")


def draw(measurements: list[Measurement], valleys: list[Valley]) -> "Figure":
    """Draws time and error against the number of parameters, and the valley."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5.4), layout="constrained")
    cost, error, step = figure.subplots(1, 3)
    draw_methods(cost, measurements, lambda each: 1e3 * each.seconds)
    cost.legend(frameon=False, loc="upper left")
    cost.text(0.97, 0.21, "one pass for all parameters", ha="right", transform=cost.transAxes, color="#555555")
    cost.text(0.97, 0.60, "one pass\na parameter", ha="right", transform=cost.transAxes, color="#555555")
    draw_methods(error, measurements, lambda each: each.error)
    error.text(12, 1.3e-4, "central differences", color=COLORS["numeric"])
    error.text(12, 2.5e-8, "symbolic, forward and reverse mode", color="#555555")
    draw_valley(step, valleys)
    cost.set(
        title="Cost: reverse mode takes one pass,\nhowever many parameters there are", xlabel="number of parameters"
    )
    cost.set(ylabel="milliseconds for one gradient")
    error.set(title="Accuracy: formulas err in the last digit,\ncentral differences two or three before it")
    error.set(ylabel="relative error of the gradient (float32)", xlabel="number of parameters", ylim=(5e-9, 1e-2))
    step.set(title="Central differences have a best step:\na larger one bends away, a smaller one drowns in rounding")
    step.set(ylabel="relative error of the gradient", xlabel="step h", ylim=(1e-12, 1e2))
    for axes in (cost, error, step):
        axes.set(xscale="log", yscale="log")
        axes.grid(color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_methods(axes: "Axes", measurements: list[Measurement], value: Callable[[Measurement], float]) -> None:
    """One line a method."""
    for name in METHODS:
        mine = [each for each in measurements if each.method == name]
        axes.plot(
            [each.num_parameters for each in mine],
            [value(each) for each in mine],
            color=COLORS[name],
            marker=MARKERS[name],
            label=name,
        )


def draw_valley(axes: "Axes", valleys: list[Valley]) -> None:
    """Both precisions, each with the step that `numeric` takes."""
    for each, color in zip(valleys, (COLORS["numeric"], "#7A3B9A"), strict=True):
        wanted = best_step(each.dtype)
        axes.plot(each.steps, each.errors, color=color, marker=".", label=str(each.dtype).removeprefix("torch."))
        axes.axvline(wanted, color=color, linestyle=":", linewidth=1)
        axes.annotate("ε$^{1/3}$", (wanted, 8), (4, 0), textcoords="offset points", color=color)
    axes.text(3e-11, 3e-4, "rounding ~ ε/h", rotation=-48, color="#555555")
    axes.text(2.5e-3, 2e-8, "truncation ~ h²", rotation=66, color="#555555")
    axes.legend(frameon=False, loc="lower left")


def write(figure: "Figure", folder: Path) -> Path:
    """Writes the picture as a PNG, and as an image for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "derivatives.png"
    figure.savefig(picture, dpi=110)
    with SummaryWriter(str(folder)) as writer:
        writer.add_figure("derivatives", figure)
    return picture


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/derivatives"), help="folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="up to 100 parameters only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it brings
    sizes = NUM_PARAMETERS[:3] if options.quick else NUM_PARAMETERS
    progress("warming up …")  # SymPy derives, torch loads its formulas: once, and not what is measured
    measure(1)
    measurements = []
    for size in sizes:
        progress(f"gradients of {size:,} parameters …")
        measurements += measure(size)
    progress("steps …")
    valleys = [valley(torch.float32), valley(torch.float64)]
    progress("picture …")
    picture = write(draw(measurements, valleys), options.output)
    progress("")
    print_tables(measurements, valleys)
    say(f"\n  picture   {picture}")
    say("  look      make dashboard")


def progress(text: str) -> None:
    """Shows what goes on, in place, where a person watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    with refusing("compare_derivatives"):
        main()
