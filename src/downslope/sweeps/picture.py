"""A sweep's pictures: the loss against the learning rate, and the curves of its jobs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downslope.pictures.style import LIGHT, Theme, new_figure, paint, png
from downslope.runs.whole_files import whole_file
from downslope.sweeps.table import GRADIENT_NORMS, Job, curve_tags, judged_by, varied_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 7  # colours that the eye tells apart
MOST_PANELS = 12
LOSS, NORM = 0, 1  # rows of the small multiples
SYMBOLS = {"diverged": "X", "failed": "s", "interrupted": "D", "not run": "o"}


def suggested_rate(jobs: Sequence[Job]) -> float | None:
    """Returns the rate to try next: what the best job suggests."""
    return jobs[0].result.suggested_learning_rate if jobs and jobs[0].result else None


def lines_of(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Groups the jobs by whatever was varied beside the learning rate: a line each, its points in the rate's order."""
    others = [key for key in varied_keys(jobs) if key != "lr"]
    lines: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: (job.learning_rate or 0.0, job.name)):
        if job.learning_rate:
            lines.setdefault(", ".join(f"{key}={_short(job.overrides.get(key, ''))}" for key in others), []).append(job)
    return dict(sorted(lines.items()))


def _short(text: str, most: int = 24) -> str:
    """No longer than fits, and no formula: matplotlib would read one between two dollars."""
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def draw_learning_rate(jobs: Sequence[Job], theme: Theme = LIGHT) -> "Figure":
    """Draws the last and the best objective against the learning rate; jobs without one stand at the top edge."""
    objective, _ = judged_by(jobs)
    figure = new_figure(9.6, 5.4, theme, layout="constrained")
    axes = figure.add_subplot()
    lines = lines_of(jobs)
    above = (
        0.0 if all(job.objective >= 0 for job in jobs if math.isfinite(job.objective)) else -math.inf
    )  # a likelihood may be negative, an R²
    if len(lines) <= MOST_LINES:
        for index, (label, line) in enumerate(lines.items()):
            edge = 1.0 + 0.03 * index  # so that no line hides the next one's
            _draw_lines(axes, [line], label, above, color=theme.lines[index], edge=edge)
    else:
        others = ", ".join(key for key in varied_keys(jobs) if key != "lr")
        _draw_lines(axes, [*lines.values()], f"{len(lines)} lines: {others}", above, color=theme.lines[0], alpha=0.35)
    _draw_limits(axes, jobs, theme)
    _draw_best(axes, jobs, theme, above)
    axes.set(xlabel="learning rate", ylabel=objective)
    paint(axes, theme)
    _scale(axes, "x", bool(lines))
    if above == 0.0:
        _scale(axes, "y", any(_is_drawn(job.objective) for line in lines.values() for job in line))
    axes.set_title(_headline(jobs, objective), loc="left", pad=22, color=theme.ink, fontsize=13, fontweight="bold")
    _legend(axes, theme, len(lines) > 1, jobs)
    return figure


def _is_drawn(value: float, above: float = 0.0) -> bool:
    """Tells whether an axis has a place for the value, a logarithmic one unless said otherwise."""
    return above < value < math.inf


def _draw_lines(
    axes: "Axes", lines: Sequence[Sequence[Job]], label: str, above: float, edge: float = 1.0, **look: Any
) -> None:
    """Draws lines of one colour: as one, with gaps, as a thousand single ones take many seconds."""
    done = [[job for job in line if _is_drawn(job.objective, above)] for line in lines]
    rates = _with_gaps([[job.learning_rate for job in line] for line in done])
    last = _with_gaps([[job.objective for job in line] for line in done])
    best = _with_gaps([[job.best_objective for job in line] for line in done])
    axes.plot(rates, last, label=label, marker="o", markersize=6, linewidth=2, clip_on=False, **look)
    axes.plot(rates, best, marker="_", markersize=9, linestyle=":", linewidth=1.3, clip_on=False, **look)
    for status, symbol in SYMBOLS.items():
        without = [job.learning_rate or math.nan for line in lines for job in line if job.status == status]
        if not without:
            continue
        fill = look["color"] if status == "diverged" else "none"
        axes.plot(without, [edge] * len(without), symbol, transform=axes.get_xaxis_transform(), markersize=9, zorder=4,
                  markerfacecolor=fill, markeredgecolor=look["color"], clip_on=False, **look)  # fmt: skip


def _with_gaps(lines: Sequence[Sequence[float | None]]) -> list[float]:
    return [math.nan if value is None else value for line in lines for value in (*line, None)]


def _draw_limits(axes: "Axes", jobs: Sequence[Job], theme: Theme) -> None:
    """2/λ of plain gradient descent: a line, or a band where the jobs' data differ."""
    limits = sorted(job.limit for job in jobs if job.limit)
    if not limits:
        return
    axes.axvspan(limits[0], limits[-1], color=theme.quiet, alpha=0.15, linewidth=0)
    axes.axvline(limits[-1], color=theme.quiet, linestyle="--", linewidth=1.4)
    axes.annotate(
        f"2/λ = {limits[-1]:.3g}", (limits[-1], 0.96), (-5, 0), xycoords=axes.get_xaxis_transform(),
        textcoords="offset points", rotation=90, ha="right", va="top", color=theme.quiet,
        bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _draw_best(axes: "Axes", jobs: Sequence[Job], theme: Theme, above: float) -> None:
    best = jobs[0]
    if best.learning_rate and _is_drawn(best.objective, above):
        axes.plot(best.learning_rate, best.objective, "o", markersize=15, markerfacecolor="none",
                  markeredgecolor=theme.ink, markeredgewidth=1.6, clip_on=False)  # fmt: skip
    if rate := suggested_rate(jobs):
        axes.plot(rate, 0.0, "^", transform=axes.get_xaxis_transform(), color=theme.ink, markersize=11, clip_on=False)
        axes.annotate(f"try {rate:.3g}", (rate, 0.0), (9, 6), xycoords=axes.get_xaxis_transform(),
                      textcoords="offset points", color=theme.ink)  # fmt: skip


def _headline(jobs: Sequence[Job], objective: str) -> str:
    best = jobs[0]
    if not math.isfinite(best.objective):
        return f"No job has a {objective}"
    what = ", ".join(f"{key}={_short(value)}" for key, value in best.overrides.items() if key in varied_keys(jobs))
    return f"Best {objective} {best.objective:.4g}" + (f" at {what}" if what else "")


def _legend(axes: "Axes", theme: Theme, several: bool, jobs: Sequence[Job]) -> None:
    """What lines and symbols mean, above the picture, so that nothing covers a point."""
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    labels: list[str] = []
    if several:
        handles, labels = axes.get_legend_handles_labels()
    signs = [(Line2D([], [], color=theme.quiet, marker="o"), "last"),
             (Line2D([], [], color=theme.quiet, linestyle=":", marker="_"), "best on its way")]  # fmt: skip
    statuses = {job.status for job in jobs if job.learning_rate}
    for status in (status for status in SYMBOLS if status in statuses):
        fill = theme.quiet if status == "diverged" else "none"
        sign = Line2D([], [], linestyle="none", marker=SYMBOLS[status], markerfacecolor=fill, markersize=8,
                      markeredgecolor=theme.quiet)  # fmt: skip
        signs.append((sign, status))
    handles += [sign for sign, _ in signs]
    labels += [label for _, label in signs]
    axes.figure.legend(handles, labels, loc="outside lower left", ncols=5, frameon=False, labelcolor=theme.ink)


def _scale(axes: "Axes", name: str, has_values: bool) -> None:
    """0.4, 0.5, 0.6 where a logarithmic axis spans less than a decade, and 0.01 rather than 10⁻²."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{name}axis")
    if not has_values:  # which an axis must have to be logarithmic
        axis.set_ticks([])
        return
    axes.set(**{f"{name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 1
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 7, 8) if decades < 1.2 else (1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_curves(jobs: Sequence[Job], theme: Theme = LIGHT) -> "Figure | None":
    """Draws loss and gradient norm against steps, a column a job, on common scales; None if no job has a curve.

    At most `MOST_PANELS` jobs, evenly over the learning rates, the best among them.
    """
    shown = _sample([job for job in jobs if job.folder.is_dir() and any(job.curves.values())])
    if not shown:
        return None
    columns = min(len(shown), 6)
    rows = 2 * math.ceil(len(shown) / columns)
    figure = new_figure(max(2.0 * columns, 5.0) + 0.8, 1.75 * rows + 0.4, theme, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    objective, _ = judged_by(jobs)
    objectives = curve_tags(objective)
    for kind, tags in ((LOSS, objectives), (NORM, GRADIENT_NORMS[:1])):
        _share_scale(grid[kind::2].flat, shown, tags)
    for index, job in enumerate(shown):
        row, column = divmod(index, columns)
        loss, norm = grid[2 * row + LOSS][column], grid[2 * row + NORM][column]
        loss.set_title(_panel_title(job, jobs), fontsize=9, color=theme.ink)
        norm.set_xlabel("step", fontsize=8)
        for tag, color in zip(objectives, theme.lines, strict=False):
            _draw_curve(loss, job.curves.get(tag, {}), color, tag)
        _draw_curve(norm, job.curves.get(GRADIENT_NORMS[0], {}), theme.lines[2], "gradient norm")
        for axes, label in ((loss, objective.rpartition("/")[2]), (norm, "gradient norm")):
            _finish_panel(axes, job, theme, label if column == 0 else "")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=8, labelcolor=theme.ink)
    return figure


def _finish_panel(axes: "Axes", job: Job, theme: Theme, label: str) -> None:
    """Only the first of a row has a label and numbers: the scale is that of all."""
    axes.set_axis_on()
    axes.set_xlim(0, max((step for curve in job.curves.values() for step in curve), default=1) or 1)
    axes.set_ylabel(label, fontsize=9)
    axes.minorticks_off()  # half the time of drawing
    paint(axes, theme)
    axes.tick_params(labelsize=7, labelleft=bool(label))


def _sample(jobs: Sequence[Job]) -> list[Job]:
    ordered = sorted(jobs, key=lambda job: (job.learning_rate or 0.0, job.name))
    if len(ordered) <= MOST_PANELS:
        return ordered
    step = (len(ordered) - 1) / (MOST_PANELS - 1)
    chosen = [ordered[round(index * step)] for index in range(MOST_PANELS)]
    if jobs[0] not in chosen:
        chosen[-2] = jobs[0]
    return sorted(chosen, key=ordered.index)


def _panel_title(job: Job, jobs: Sequence[Job]) -> str:
    if not job.learning_rate:
        return _short(job.name)
    varied = [f"{key.rpartition('.')[2]}={_short(job.overrides.get(key, ''), 14)}" for key in varied_keys(jobs)]
    mark = "" if job.status == "completed" else f" ({job.status})"
    return "\n".join(varied or [f"lr={job.learning_rate:g}"]) + mark


def _share_scale(panels: Any, jobs: Sequence[Job], tags: Sequence[str]) -> None:
    """One scale for all panels: the eye compares heights. A job that blew up does not squeeze the others flat."""
    curves = [job.curves.get(tag, {}) for job in jobs for tag in tags]
    values = sorted(value for curve in curves for value in curve.values() if _is_drawn(value))
    for axes in panels if values else ():  # an axis without values cannot be logarithmic
        axes.set_yscale("log")
        axes.set_ylim(values[0] / 1.3, min(values[-1] * 1.3, values[len(values) // 2] * 100))


def _draw_curve(axes: "Axes", curve: Mapping[int, float], color: str, label: str) -> None:
    steps = sorted(step for step, value in curve.items() if _is_drawn(value))
    axes.plot(steps, [curve[step] for step in steps], color=color, linewidth=1.4, label=label,
              marker="." if len(steps) < 3 else None)  # fmt: skip


def save(figure: "Figure", file: Path) -> None:
    """Writes a picture, whole or not at all."""
    with whole_file(file) as stream:
        stream.write(png(figure))
