"""The loss as a landscape seen from above, and the path of the descent over it."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from downslope.gradients.quadratic import Plane
from downslope.pictures.style import GREEN, INK, QUIET, RED, new_axes, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CELLS = 96
NUM_LEVELS = 14
FARTHEST = 6.0  # times the way from start to optimum: farther out a diverging path leaves the picture


def draw_loss_surface(plane: Plane, labels: tuple[str, str], num_steps: int) -> "Figure":
    """Draws contours, path, start, end and optimum.

    A path that runs away leaves the frame, which keeps the first steps large enough to be seen.

    Args:
        plane: The loss, and the path over it.
        labels: Of its axes.
        num_steps: Optimizer steps that the path stands for.
    """
    path, optimum = plane.path.numpy(), plane.optimum.numpy()
    reach = np.abs(path - optimum)
    away = reach > FARTHEST * max(np.abs(path[0] - optimum).max(), 1e-12)
    left_at = int(away.any(axis=1).argmax()) if away.any() else None
    if left_at is None:
        seen = np.vstack([path, optimum])
        narrowest = 0.2  # a straight path is seen in a plane all the same
    else:
        seen = path[: max(left_at, 4)]
        narrowest = 1e-3  # the zig-zag is what is to be seen: the optimum may be out of the frame
    low, high = seen.min(axis=0), seen.max(axis=0)
    span = np.maximum(high - low, narrowest * (high - low).max() + 1e-12)
    centre = (low + high) / 2
    low, high = centre - 0.62 * span, centre + 0.62 * span

    figure, axes = new_axes()
    axes.grid(visible=False)
    x, y = np.meshgrid(*(np.linspace(low[i], high[i], NUM_CELLS) for i in range(2)))
    offset = np.stack([x, y], axis=-1) - optimum
    excess = np.einsum("...i,ij,...j->...", offset, plane.hessian.numpy(), offset) / 2
    root = np.sqrt(excess)  # equal distances of contours are then equal steps up the bowl's side
    levels = np.linspace(0, root.max(), NUM_LEVELS)
    axes.contourf(x, y, root, levels=levels, cmap="Blues", alpha=0.75)
    axes.contour(x, y, root, levels=levels[1:], colors="white", linewidths=0.7)

    drawn = path if left_at is None else path[: max(left_at, 4) + 1]  # farther out the lines lie upon each other
    axes.plot(*drawn.T, color=RED, linewidth=1.0, marker="o", markersize=2.6, label=f"descent, {num_steps:,} steps")
    marks: tuple[tuple[NDArray[np.float64], str, dict[str, Any]], ...] = (
        (path[0], "start", {"marker": "o", "color": "white", "markeredgecolor": INK, "markersize": 9}),
        (optimum, "optimum", {"marker": "*", "color": GREEN, "markeredgecolor": "white", "markersize": 17}),
        (path[-1], "end", {"marker": "s", "color": RED, "markeredgecolor": INK, "markersize": 7}),
    )
    for point, label, look in marks:
        if (low <= point).all() and (point <= high).all():
            axes.plot(*point, label=label, linestyle="none", **look)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.set(xlabel=labels[0], ylabel=labels[1])
    if left_at is None:
        title(axes, "The path of the descent", f"Darker is higher; the lowest loss is {plane.loss:.4g}")
    else:
        ratio = float(np.linalg.norm(path[-1] - optimum)) / max(float(np.linalg.norm(path[0] - optimum)), 1e-12)
        below = f"It leaves the picture, and ends {ratio:,.0f} times as far from the optimum as it started"
        title(axes, "The descent runs away", below)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.11), ncols=4, frameon=False, fontsize=9, labelcolor=QUIET)
    return figure
