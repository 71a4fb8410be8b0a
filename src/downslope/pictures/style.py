"""One look for every picture: colours that colour-blind readers tell apart, quiet axes, on paper or a dark screen."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours; those of lines after Okabe and Ito (2008), Color Universal Design."""

    paper: str
    ink: str
    quiet: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1f2328", "#656d76", "#e4e7ea",
    ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#56B4E9", "#7A3B9A"),
)  # fmt: skip
DARK = Theme(
    "#161b22", "#e6edf3", "#9198a1", "#30363d",
    ("#58A6FF", "#FF9E57", "#3FC99B", "#F29CC8", "#E8C547", "#8ED1F5", "#C297E8"),
)  # fmt: skip
BLUE, RED, GREEN, _, ORANGE = LIGHT.lines[:5]
INK, QUIET = LIGHT.ink, LIGHT.quiet
# In shares of a picture with one pair of axes. To let matplotlib find them takes as long as all the drawing.
MARGINS = {"left": 0.14, "right": 0.97, "bottom": 0.165, "top": 0.87}


def new_figure(width: float, height: float, theme: Theme = LIGHT, **settings: Any) -> "Figure":
    """Returns an empty figure, its size in inches; no display, no pyplot, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor=theme.paper, **settings)
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


def paint(axes: "Axes", theme: Theme = LIGHT) -> None:
    """Gives axes the project's look."""
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.quiet)
    axes.tick_params(which="both", colors=theme.quiet, labelsize=9)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)


def title(axes: "Axes", text: str, below: str) -> None:
    """Writes what the picture says, and below it in grey what it shows."""
    axes.set_title(f"{text}\n", loc="left", fontsize=13, fontweight="bold", color=INK)
    axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=9.5, color=QUIET, va="bottom")


def png(figure: "Figure") -> bytes:
    """Returns the figure as a PNG file's content; packed quickly rather than tightly."""
    content = io.BytesIO()
    figure.savefig(content, format="png", pil_kwargs={"compress_level": 1})
    return content.getvalue()
