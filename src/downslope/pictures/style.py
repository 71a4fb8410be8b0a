"""One look for every picture: colours that colour-blind readers tell apart, quiet axes."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PAPER, INK, QUIET, GRID = "#ffffff", "#1f2328", "#656d76", "#e4e7ea"
# After Okabe and Ito (2008), Color Universal Design.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#56B4E9", "#7A3B9A")
BLUE, RED, GREEN, _, ORANGE = LINES[:5]
# In shares of a picture with one pair of axes. To let matplotlib find them takes as long as all the drawing.
MARGINS = {"left": 0.14, "right": 0.97, "bottom": 0.165, "top": 0.87}


def new_figure(width: float, height: float, **settings: Any) -> "Figure":
    """Returns an empty figure, its size in inches; no display, no pyplot, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor=PAPER, **settings)
    FigureCanvasAgg(figure)
    return figure


def new_axes() -> "tuple[Figure, Axes]":
    """Returns a new figure of 1050 × 750 pixels, and its one pair of axes."""
    figure = new_figure(7.0, 5.0)
    figure.subplots_adjust(**MARGINS)
    axes = figure.add_subplot()
    paint(axes)
    for axis in (axes.xaxis, axes.yaxis):  # no "1e6" in a corner
        axis.set_major_formatter(lambda value, _: f"{value:,.7g}".replace("-", "−"))
    return figure, axes


def paint(axes: "Axes") -> None:
    """Gives axes the project's look."""
    axes.set_facecolor(PAPER)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(which="both", colors=QUIET, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def title(axes: "Axes", text: str, below: str) -> None:
    """Writes what the picture says, and below it in grey what it shows."""
    # At a height that is told: to look for one, matplotlib would lay out the whole picture once more.
    axes.set_title(f"{text}\n", loc="left", y=1.0, fontsize=13, fontweight="bold", color=INK)
    axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=9.5, color=QUIET, va="bottom")


def png(figure: "Figure") -> bytes:
    """Returns the figure as a PNG file's content; packed quickly rather than tightly."""
    content = io.BytesIO()
    figure.savefig(content, format="png", pil_kwargs={"compress_level": 1})
    return content.getvalue()
