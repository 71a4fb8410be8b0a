"""The loss along the gradient, and where the step that was taken lands on it."""

from typing import TYPE_CHECKING

import numpy as np

from downslope.gradients.line_search import Profile
from downslope.gradients.quadratic import Parabola
from downslope.pictures.style import BLUE, GREEN, INK, ORANGE, RED, new_axes, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SAMPLES, NUM_POINTS = 24, 300  # of what is drawn, sampled and in closed form
TOO_SHORT, UPHILL = 0.5, 2.0  # times the best step: below half, three quarters of what was to be had is the most
NO_STEP = 1e-6  # times the best step: a schedule's end, or what rounding leaves of a step across the gradient
SHORT = 0.25  # times the largest stable step: half the 1/λ that is the best in the steepest direction


def name_step(ratio: float, learning_rate: float, largest_stable: float | None, uphill: bool) -> str:
    """Names a step by its length in units of the best one along its gradient.

    A step of s times the best length buys s(2 − s) of what the best one buys: at s = ½ three quarters, at 2 nothing.
    It is too short only where a longer one is safe in every direction: a sound run ends in the flattest, along which
    the best step is far beyond what the steepest allows.

    Args:
        ratio: s.
        learning_rate: η of the step.
        largest_stable: 2/λ over all directions, where it is known.
        uphill: Whether the loss is higher after it.

    Example:
        >>> [name_step(ratio, ratio, 2.0, ratio > 2) for ratio in (-0.1, -1e-18, 0.1, 0.9, 1.6, 2.2)]
        ['backwards', 'no step', 'too short', 'about right', 'overshoot', 'overshoot, uphill']
        >>> name_step(0.04, 0.1, 0.2, False)
        '0.04 × the best'
    """
    if abs(ratio) < NO_STEP:
        return "no step"
    if ratio < 0:  # momentum, or a mini-batch whose gradient is another
        return "backwards"
    if uphill:
        return "overshoot, uphill"
    if ratio < TOO_SHORT:
        safe = largest_stable is not None and learning_rate < SHORT * largest_stable
        return "too short" if safe else f"{ratio:.2g} × the best"
    return "about right" if ratio <= 2 - TOO_SHORT else "overshoot"


def draw_step_along_gradient(
    loss: Parabola | Profile, learning_rate: float, step: int, largest_stable: float | None = None
) -> "Figure":
    """Draws the loss over the length of the step, with the one that was taken, the best, and of a parabola the edge.

    Args:
        loss: Along the negative gradient: over all rows, or sampled on a batch.
        learning_rate: η of the step that was taken.
        step: Which one, counted from 0.
        largest_stable: 2/λ over all directions, where it is known.
    """
    best, sampled = loss.best, isinstance(loss, Profile)
    ratio = learning_rate / best
    right = 1.12 * max(2.1 * best, learning_rate)
    left = min(-0.06 * right, 1.2 * learning_rate)
    crowded, has_room = right - left > 3.5 * best, right > 3.5 * best  # between the marks, to the right of both
    num_points = NUM_SAMPLES if sampled else NUM_POINTS
    valley = np.linspace(0, 2 * best, num_points // 3 if crowded else 3)
    rates = np.unique(np.concatenate([np.linspace(left, right, num_points), valley]))
    losses = np.array([loss(rate) for rate in rates.tolist()])
    losses[~np.isfinite(losses)] = np.nan  # beyond the range of its numbers
    figure, axes = new_axes()
    marker = "o" if sampled else ""  # what was evaluated
    axes.plot(rates, losses, color=BLUE, linewidth=2.2, label="loss", marker=marker, markersize=3)
    low, high = loss(best), float(np.nanmax(losses))
    drop = high - low
    marks = [(best, "best" if sampled else "best, 1/curvature", GREEN, 1.06 if crowded else 1.12)]
    if isinstance(loss, Parabola):
        marks.append((loss.edge, "edge, 2/curvature", ORANGE, 1.12))
    for rate, text, colour, height in marks:
        axes.axvline(rate, color=colour, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{text} = {rate:.3g}", (rate, low + height * drop), xytext=(5 if has_room else -5, 0),
            textcoords="offset points", color=INK, fontsize=9, ha="left" if has_room else "right", va="top",
        )  # fmt: skip
    axes.axhline(loss(0.0), color=INK, linewidth=0.8, linestyle=":")
    axes.plot(0, loss(0.0), "o", color="white", markeredgecolor=INK, markersize=9)
    arrow = {"arrowstyle": "-|>", "color": RED, "linewidth": 1.8, "shrinkA": 6, "shrinkB": 5}
    if abs(ratio) >= NO_STEP:
        axes.annotate("", (learning_rate, loss(learning_rate)), (0, loss(0.0)), arrowprops=arrow)
    axes.plot(learning_rate, loss(learning_rate), "o", color=RED, markeredgecolor=INK, markersize=9, label="taken")
    axes.set(xlim=(rates[0], right), ylim=(low - 0.08 * drop, low + 1.15 * drop))
    axes.set_xlabel("learning rate: how far the step follows the gradient")
    axes.set_ylabel(f"{'loss of the batch' if sampled else 'training loss'} after the step")
    uphill = not loss(learning_rate) <= loss(0.0) if sampled else ratio > UPHILL
    name = name_step(ratio, learning_rate, largest_stable, uphill)
    below = f"It moves by {learning_rate:.3g} × the gradient of {'its batch' if sampled else 'all rows'}"
    if abs(ratio) < NO_STEP:
        below = "It does not follow its gradient"
    elif largest_stable and SHORT * largest_stable <= learning_rate < TOO_SHORT * best:
        below += f"; a rate above {largest_stable:.3g} diverges along the steepest direction"
    else:
        below += f": {ratio:.3g} × the best step along it"
    title(axes, f"Step {step:,}: {name} along its gradient", below)
    return figure
