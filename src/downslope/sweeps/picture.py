"""A sweep's pictures: the loss against the learning rate, and the curves of its jobs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from downslope.pictures.style import LIGHT, Theme, new_figure, paint
from downslope.sweeps.table import GRADIENT_NORM, Job, curve_tags, judged_by, varied_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 7  # colours that the eye tells apart
MOST_PANELS = 12
SYMBOLS = {"diverged": "X", "failed": "s", "interrupted": "D", "not run": "o"}


def lines_of(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Groups the jobs by whatever was varied beside the learning rate: a line each, its points in the rate's order."""
    others = [key for key in varied_keys(jobs) if key != "lr"]
    lines: dict[str, list[Job]] = {}
    for job in _by_rate(jobs):
        if job.learning_rate:
            lines.setdefault(", ".join(f"{key}={_short(job.overrides.get(key, ''))}" for key in others), []).append(job)
    return dict(sorted(lines.items()))


def _by_rate(jobs: Sequence[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: (job.learning_rate or 0.0, job.name))


def _short(text: str, most: int = 24) -> str:
    """No longer than fits, and no formula: matplotlib would read one between two dollars."""
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def draw_learning_rate(jobs: Sequence[Job], theme: Theme = LIGHT) -> "Figure":
    """Draws the objective of the last weights against the learning rate; jobs without one stand at the top edge."""
    objective, _ = judged_by(jobs)
    figure = new_figure(9.6, 5.4, theme, layout="constrained")
    axes = figure.add_subplot()
    lines = lines_of(jobs)
    if len(lines) <= MOST_LINES:
        for index, (label, line) in enumerate(lines.items()):
            edge = 1.0 + 0.03 * index  # so that no line hides the next one's
            _draw_lines(axes, [line], label, edge, color=theme.lines[index])
    else:
        others = ", ".join(key for key in varied_keys(jobs) if key != "lr")
        _draw_lines(axes, lines.values(), f"{len(lines)} lines: {others}", color=theme.lines[0], alpha=0.35)
    _draw_limits(axes, jobs, theme)
    _draw_best(axes, jobs[0], theme)
    axes.set(xlabel="learning rate", ylabel=objective)
    paint(axes, theme)
    values = [job.objective for line in lines.values() for job in line if math.isfinite(job.objective)]
    _scale(axes, "x", [job.learning_rate or 0.0 for line in lines.values() for job in line])
    _scale(axes, "y", values)
    axes.set_title(_headline(jobs, objective), loc="left", pad=22, color=theme.ink, fontsize=13, fontweight="bold")
    _legend(axes, theme, jobs, len(lines) > 1)
    return figure


def _draw_lines(axes: "Axes", lines: Iterable[Sequence[Job]], label: str, edge: float = 1.0, **look: Any) -> None:
    """Draws lines of one colour: as one, with gaps, as a thousand single ones take many seconds."""
    points = [(math.nan, math.nan)]
    for line in lines:
        points += [(job.learning_rate or math.nan, job.objective) for job in line if math.isfinite(job.objective)]
        points.append((math.nan, math.nan))
    axes.plot(*zip(*points[1:], strict=True), label=label, marker="o", markersize=6, linewidth=2, clip_on=False, **look)
    for status, symbol in SYMBOLS.items():
        without = [job.learning_rate or math.nan for line in lines for job in line if job.status == status]
        fill = look["color"] if status == "diverged" else "none"
        if without:
            axes.plot(without, [edge] * len(without), symbol, transform=axes.get_xaxis_transform(), markersize=9,
                      zorder=4, markerfacecolor=fill, markeredgecolor=look["color"], clip_on=False, **look)  # fmt: skip


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


def _draw_best(axes: "Axes", best: Job, theme: Theme) -> None:
    if best.learning_rate and math.isfinite(best.objective):
        axes.plot(best.learning_rate, best.objective, "o", markersize=15, markerfacecolor="none",
                  markeredgecolor=theme.ink, markeredgewidth=1.6, clip_on=False)  # fmt: skip
    if rate := best.suggested_rate:
        axes.plot(rate, 0.0, "^", transform=axes.get_xaxis_transform(), color=theme.ink, markersize=11, clip_on=False)
        axes.annotate(f"try {rate:.3g}", (rate, 0.0), (9, 6), xycoords=axes.get_xaxis_transform(),
                      textcoords="offset points", color=theme.ink)  # fmt: skip


def _headline(jobs: Sequence[Job], objective: str) -> str:
    best = jobs[0]
    if not math.isfinite(best.objective):
        return f"No job has a {objective}"
    what = ", ".join(f"{key}={_short(value)}" for key, value in best.overrides.items() if key in varied_keys(jobs))
    return f"Best {objective} {best.objective:.4g}" + (f" at {what}" if what else "")


def _legend(axes: "Axes", theme: Theme, jobs: Sequence[Job], several: bool) -> None:
    """What lines and symbols mean, below the picture, so that nothing covers a point."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels() if several else ([], [])
    statuses = {job.status for job in jobs if job.learning_rate}
    for status in (status for status in SYMBOLS if status in statuses):
        fill = theme.quiet if status == "diverged" else "none"
        look = {"markerfacecolor": fill, "markeredgecolor": theme.quiet, "markersize": 8}
        handles.append(Line2D([], [], linestyle="none", marker=SYMBOLS[status], **look))  # type: ignore[arg-type]
        labels.append(status)
    if handles:
        axes.figure.legend(handles, labels, loc="outside lower left", ncols=5, frameon=False, labelcolor=theme.ink)


def _scale(axes: "Axes", name: str, values: Sequence[float]) -> None:
    """0.4, 0.5, 0.6 where a logarithmic axis spans less than a decade, and 0.01 rather than 10⁻²."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{name}axis")
    if not values:
        axis.set_ticks([])
    elif min(values) > 0:  # a likelihood may be negative, an R²
        axes.set(**{f"{name}scale": "log"})
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=range(1, 9) if high < 16 * low else (1, 3)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def draw_curves(jobs: Sequence[Job], theme: Theme = LIGHT) -> "Figure | None":
    """Draws loss and gradient norm against steps, a column a job, on common scales; None if no job has a curve.

    At most `MOST_PANELS` jobs, evenly over the learning rates, the best among them.
    """
    shown = _sample([job for job in jobs if any(job.curves.values())])
    if not shown:
        return None
    columns = min(len(shown), 6)
    rows = 2 * math.ceil(len(shown) / columns)
    figure = new_figure(max(2.0 * columns, 5.0) + 0.8, 1.75 * rows + 0.4, theme, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    objective, _ = judged_by(jobs)
    kinds = ((objective.rpartition("/")[2], curve_tags(objective), theme.lines),
             ("gradient norm", (GRADIENT_NORM,), theme.lines[2:]))  # fmt: skip
    for kind, (name, tags, colors) in enumerate(kinds):
        panels = [grid[2 * (index // columns) + kind][index % columns] for index in range(len(shown))]
        _share_scale(panels, shown, tags)
        for index, (job, axes) in enumerate(zip(shown, panels, strict=True)):
            for tag, color in zip(tags, colors, strict=False):
                _draw_curve(axes, job.curves.get(tag, {}), color, tag)
            _finish_panel(axes, job, theme, name if index % columns == 0 else "")
            if kind == 0:
                axes.set_title(_panel_title(job, jobs), fontsize=9, color=theme.ink)
            else:
                axes.set_xlabel("step", fontsize=8)
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
    ordered = _by_rate(jobs)
    if len(ordered) <= MOST_PANELS:
        return ordered
    step = (len(ordered) - 1) / (MOST_PANELS - 1)
    chosen = [ordered[round(index * step)] for index in range(MOST_PANELS)]
    if jobs[0] not in chosen:
        chosen[-2] = jobs[0]
    return _by_rate(chosen)


def _panel_title(job: Job, jobs: Sequence[Job]) -> str:
    if not job.learning_rate:
        return _short(job.name)
    varied = [f"{key.rpartition('.')[2]}={_short(job.overrides.get(key, ''), 14)}" for key in varied_keys(jobs)]
    mark = "" if job.status == "completed" else f" ({job.status})"
    return "\n".join(varied or [f"lr={job.learning_rate:g}"]) + mark


def _share_scale(panels: Sequence["Axes"], jobs: Sequence[Job], tags: Sequence[str]) -> None:
    """One scale for all panels: the eye compares heights. A job that blew up does not squeeze the others flat."""
    curves = [job.curves.get(tag, {}) for job in jobs for tag in tags]
    values = sorted(value for curve in curves for value in curve.values() if 0 < value < math.inf)
    for axes in panels if values else ():  # an axis without values cannot be logarithmic
        axes.set_yscale("log")
        axes.set_ylim(values[0] / 1.3, min(values[-1] * 1.3, values[len(values) // 2] * 100))


def _draw_curve(axes: "Axes", curve: Mapping[int, float], color: str, label: str) -> None:
    steps = sorted(step for step, value in curve.items() if 0 < value < math.inf)
    axes.plot(steps, [curve[step] for step in steps], color=color, linewidth=1.4, label=label,
              marker="." if len(steps) < 3 else None)  # fmt: skip
