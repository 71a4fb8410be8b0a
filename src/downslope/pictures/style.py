"""One look for every picture of the project: colours that colour-blind readers tell apart, quiet axes, one size."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), Color Universal Design.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
INK, QUIET, GRID = "#222222", "#666666", "#E3E3E3"
SIZE = (7.0, 5.0)  # inches: 1050 × 750 pixels
DPI = 150
# In shares of the picture. To let matplotlib find them takes as long as all the drawing.
MARGINS = {"left": 0.14, "right": 0.97, "bottom": 0.165, "top": 0.87}


def new_figure() -> "tuple[Figure, Axes]":
    """Returns a figure with one pair of axes in the project's look; no display, no pyplot, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    figure.subplots_adjust(**MARGINS)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):  # no "1e6" in a corner
        axis.set_major_formatter(lambda value, _: f"{value:,.7g}".replace("-", "−"))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def title(axes: "Axes", text: str, below: str) -> None:
    """Writes what the picture says, and below it in grey what it shows."""
    axes.set_title(f"{text}\n", loc="left", fontsize=13, fontweight="bold", color=INK)
    axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=9.5, color=QUIET, va="bottom")


def png(figure: "Figure") -> bytes:
    """Returns the figure as a PNG file's content; packed quickly rather than tightly."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
    return content.getvalue()
