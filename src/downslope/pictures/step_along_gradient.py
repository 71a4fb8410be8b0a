"""The loss along the gradient, and where the step that was taken lands on it."""

from typing import TYPE_CHECKING

import numpy as np

from downslope.gradients.quadratic import Parabola
from downslope.pictures.style import BLUE, GREEN, INK, ORANGE, RED, new_figure, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOO_SHORT, UPHILL = 0.5, 2.0  # times the best step: below half, three quarters of what was to be had is the most


def name_step(ratio: float) -> str:
    """Names a step by its length in units of the best one.

    A step of s times the best length buys s(2 − s) of what the best one buys: at s = ½ three quarters, at 2 nothing.

    Example:
        >>> [name_step(ratio) for ratio in (-0.1, 0.0, 0.1, 0.9, 1.6, 2.2)]
        ['backwards', 'no step', 'too short', 'about right', 'overshoot', 'overshoot, uphill']
    """
    if ratio < 0:  # momentum, or a mini-batch whose gradient is another
        return "backwards"
    if ratio == 0:
        return "no step"
    if ratio < TOO_SHORT:
        return "too short"
    if ratio > UPHILL:
        return "overshoot, uphill"
    return "about right" if ratio <= 2 - TOO_SHORT else "overshoot"


def draw_step_along_gradient(parabola: Parabola, learning_rate: float, step: int) -> "Figure":
    """Draws the loss over the length of the step, with the one that was taken, the best, and the edge.

    Args:
        parabola: The loss along the negative gradient.
        learning_rate: η of the step that was taken.
        step: Which one, counted from 0.
    """
    best = parabola.best
    name = name_step(learning_rate / best)
    right = 1.12 * max(2.1 * best, learning_rate)
    rates = np.linspace(min(-0.06 * right, 1.2 * learning_rate), right, 300)
    figure, axes = new_figure()
    axes.plot(rates, [parabola(rate) for rate in rates.tolist()], color=BLUE, linewidth=2.2, label="loss")
    low, high = parabola(best), max(parabola(float(rates[0])), parabola(right))
    drop = high - low
    crowded = right > 3.5 * best
    for rate, text, colour, height in (
        (best, "best, 1/λ$_g$", GREEN, 1.06 if crowded else 1.12),
        (2 * best, "edge, 2/λ$_g$", ORANGE, 1.12),
    ):
        axes.axvline(rate, color=colour, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{text} = {rate:.3g}",
            (rate, low + height * drop),
            xytext=(5 if crowded else -5, 0),
            textcoords="offset points",
            color=INK,
            fontsize=9,
            ha="left" if crowded else "right",
            va="top",
        )
    axes.axhline(parabola(0.0), color=INK, linewidth=0.8, linestyle=":")
    axes.plot(0, parabola(0.0), "o", color="white", markeredgecolor=INK, markersize=9)
    axes.annotate(
        "",
        (learning_rate, parabola(learning_rate)),
        (0, parabola(0.0)),
        arrowprops={"arrowstyle": "-|>", "color": RED, "linewidth": 1.8, "shrinkA": 6, "shrinkB": 5},
    )
    axes.plot(learning_rate, parabola(learning_rate), "o", color=RED, markeredgecolor=INK, markersize=9, label="taken")
    axes.set(xlim=(rates[0], right), ylim=(low - 0.08 * drop, low + 1.15 * drop))
    axes.set_xlabel("learning rate: how far the step follows the gradient", color=INK)
    axes.set_ylabel("training loss after the step", color=INK)
    below = f"It goes {learning_rate:.3g} × the gradient: {learning_rate / best:.3g} × the best along this one"
    title(axes, f"Step {step:,}: {name} along its gradient", below)
    return figure
