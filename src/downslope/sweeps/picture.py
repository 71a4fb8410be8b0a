"""A sweep's pictures: the loss against the learning rate, and the curves of its jobs."""

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from downslope.pictures.style import INK, LINES, PAPER, QUIET, new_figure, paint
from downslope.sweeps.comparison import Average, as_good, as_good_on_average, over_seeds
from downslope.sweeps.table import GRADIENT_NORM, SAME, Job, curve_tags, judged_by, next_rate, varied_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 7  # colours that the eye tells apart
MOST_KEYS = 4  # in a curve's name
MOST_CURVES = 12
MANY = 60  # points that are a curve, and not marks
NEARLY = 1.05  # times the best objective, which is as good
SYMBOLS = {"diverged": "X", "failed": "s", "interrupted": "D", "not run": "o"}
ON_PAPER = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # a text that no line may cross


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


def draw_learning_rate(jobs: Sequence[Job]) -> "Figure":
    """Draws the objective of the last weights against the learning rate; jobs without one stand at the top edge."""
    objective, _ = judged_by(jobs)
    figure = new_figure(9.6, 5.4, layout="constrained")
    axes = figure.add_subplot()
    lines, averages = lines_of(jobs), over_seeds(jobs)
    is_curve = len(lines) == 1 and len(jobs) > MANY
    if grid := _grid(jobs):
        _draw_map(axes, jobs, *grid)
    elif averages:
        lines = _draw_averages(axes, averages)
    elif len(lines) <= MOST_LINES:
        for index, (label, line) in enumerate(lines.items()):
            edge = 1.0 + 0.03 * index  # so that no line hides the next one's
            _draw_lines(axes, [line], label, edge, is_curve, color=LINES[index])
            if is_curve:
                _draw_regions(axes, line)
    else:
        others = ", ".join(key for key in varied_keys(jobs) if key != "lr")
        _draw_lines(axes, lines.values(), f"{len(lines)} lines: {others}", color=LINES[0], alpha=0.35)
    _draw_limits(axes, jobs)
    if not grid:
        best, value = (averages[0], averages[0].mean) if averages else (jobs[0], jobs[0].objective)
        _draw_best(axes, best.learning_rate, value, next_rate(jobs))
        axes.set_ylabel(f"{objective}, mean and standard deviation over seeds" if averages else objective)
    axes.set_xlabel("learning rate")
    paint(axes)
    values = [] if grid else [job.objective for line in lines.values() for job in line if math.isfinite(job.objective)]
    _scale(axes, "x", [job.learning_rate or 0.0 for line in lines.values() for job in line])
    if is_curve:
        _scale_of_most(axes, values)
    elif not grid:
        _scale(axes, "y", values)
    axes.set_title(_headline(jobs, averages, objective), loc="left", pad=22, color=INK, fontsize=13, fontweight="bold")
    drawn = [] if grid else [job for job in jobs if not (is_curve and job.status == "diverged")]
    _legend(axes, drawn, len(lines) > 1 and not grid)
    return figure


def _draw_averages(axes: "Axes", averages: Sequence[Average]) -> dict[str, list[Job]]:
    """A line of means with their spread for whatever was varied beside rate and seed, its jobs as small dots."""
    lines: dict[str, list[Average]] = {}
    for each in sorted(averages, key=lambda each: each.learning_rate or 0.0):
        others = [f"{key}={_short(value)}" for key, value in each.overrides.items() if key != "lr"]
        lines.setdefault(", ".join(others), []).append(each)
    drawn = {}
    for index, (label, line) in enumerate(sorted(lines.items())):
        color = LINES[index % MOST_LINES]
        drawn[label] = [job for each in line for job in each.jobs.values() if job.learning_rate]
        rates, means = [each.learning_rate or math.nan for each in line], [each.mean for each in line]
        look = {"color": color, "marker": "o", "markersize": 6, "linewidth": 2, "capsize": 5}
        axes.errorbar(rates, means, [each.spread for each in line], label=label, **look)  # type: ignore[arg-type]
        seeds = [(job.learning_rate, job.objective) for job in drawn[label] if math.isfinite(job.objective)]
        axes.plot(*zip(*seeds, strict=True) if seeds else ((), ()), ".", color=color, alpha=0.5)
        _draw_lines(axes, [[job for job in drawn[label] if not math.isfinite(job.objective)]], "", color=color)
    return drawn


def _draw_lines(
    axes: "Axes", lines: Collection[Sequence[Job]], label: str, edge: float = 1.0, is_curve: bool = False, **look: Any
) -> None:
    """Draws lines of one colour: as one, with gaps, as a thousand single ones take many seconds."""
    points = [(math.nan, math.nan)]
    for line in lines:
        points += [(job.learning_rate or math.nan, job.objective) for job in line if math.isfinite(job.objective)]
        points.append((math.nan, math.nan))
    size = {"linewidth": 1.4} if is_curve else {"marker": "o", "markersize": 6, "linewidth": 2}
    axes.plot(*zip(*points[1:], strict=True), label=label, clip_on=is_curve, **size, **look)
    for status, symbol in SYMBOLS.items():
        if is_curve and status == "diverged":  # `_draw_regions` tells where
            continue
        without = [job.learning_rate or math.nan for line in lines for job in line if job.status == status]
        fill = look["color"] if status == "diverged" else "none"
        if without:
            axes.plot(without, [edge] * len(without), symbol, transform=axes.get_xaxis_transform(), markersize=9,
                      zorder=4, markerfacecolor=fill, markeredgecolor=look["color"], clip_on=False, **look)  # fmt: skip


def _draw_regions(axes: "Axes", line: Sequence[Job]) -> None:
    """Of a dense line: where it is as good as the best, and where it diverges."""
    finite = [job.objective for job in line if math.isfinite(job.objective)]
    good = [job.learning_rate or 0.0 for job in line if finite and 0 < job.objective <= NEARLY * min(finite)]
    bad = [job.learning_rate or 0.0 for job in line if job.status == "diverged"]
    where: Any = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "color": INK, "fontsize": 9}
    if good and judged_by(line)[1] == "min":
        axes.axvspan(good[0], good[-1], color=LINES[2], alpha=0.15, linewidth=0)
        words = f"within {NEARLY - 1:.0%} of the best:\n{good[0]:.3g} to {good[-1]:.3g}"
        axes.annotate(words, (good[0], 0.98), (-6, 0), ha="right", va="top", **where)
    if bad:
        axes.axvspan(bad[0], bad[-1], color=LINES[1], alpha=0.15, linewidth=0)
        axes.annotate(
            f"{len(bad)} diverge,\nfrom {bad[0]:.3g} on", (bad[-1], 0.5), (0, 0), ha="right", va="top", **where
        )


def _grid(jobs: Sequence[Job]) -> tuple[str, list[float], list[float]] | None:
    """What was varied beside the rate, both their values, where that is a dense grid of numbers; else None."""
    others = [key for key in varied_keys(jobs) if key != "lr"]
    if len(others) != 1:
        return None
    try:
        rows = sorted({float(job.overrides[others[0]]) for job in jobs})
    except (KeyError, ValueError):
        return None
    columns = sorted({job.learning_rate for job in jobs if job.learning_rate})
    dense = min(len(rows), len(columns)) > MOST_LINES and len(rows) * len(columns) <= 2 * len(jobs)
    return (others[0], columns, rows) if dense else None


def _draw_map(axes: "Axes", jobs: Sequence[Job], key: str, columns: list[float], rows: list[float]) -> None:
    """A colour for the objective at each rate and value: what diverged is grey, the best is ringed."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    at, up = ({value: place for place, value in enumerate(each)} for each in (columns, rows))
    table, ended_badly = np.full((2, len(rows), len(columns)), np.nan)
    for job in jobs:
        if job.learning_rate:
            place = up[float(job.overrides[key])], at[job.learning_rate]
            table[place] = job.objective if math.isfinite(job.objective) else math.nan
            ended_badly[place] = math.nan if job.status == "completed" else 1.0
    seen = table[np.isfinite(table)]
    low, high = (float(seen.min()), float(np.quantile(seen, 0.9))) if seen.size else (0.0, 1.0)
    scale = (LogNorm if low > 0 else Normalize)(low, max(high, low * 1.001, low + 1e-12))
    axes.pcolormesh(columns, rows, ended_badly, cmap="Greys", vmin=0.0, vmax=2.0, shading="nearest")
    colours = axes.pcolormesh(columns, rows, table, cmap="viridis", norm=scale, shading="nearest")
    axes.figure.colorbar(colours, ax=axes, label=f"{judged_by(jobs)[0]} (grey: not completed)", extend="max")
    axes.set_ylabel(key)
    best = jobs[0]
    if best.learning_rate and math.isfinite(best.objective):
        axes.plot(best.learning_rate, float(best.overrides[key]), "o", markersize=13, markerfacecolor="none",
                  markeredgecolor=PAPER, markeredgewidth=2)  # fmt: skip
    if rows[0] > 0 and rows[-1] > 16 * rows[0]:
        axes.set_yscale("log")


def _draw_limits(axes: "Axes", jobs: Sequence[Job]) -> None:
    """2/λ of plain gradient descent: a line, or a band where the jobs' data differ; and the least η_c in the middle."""
    limits = sorted(job.limit for job in jobs if job.limit)
    critical = sorted(job.critical for job in jobs if job.critical)
    middle = critical[len(critical) // 2] if critical else 0.0
    is_one = bool(limits) and bool(critical) and abs(math.log(middle / limits[-1])) < SAME
    if limits:
        axes.axvspan(limits[0], limits[-1], color=QUIET, alpha=0.15, linewidth=0)
        _draw_limit(axes, limits[-1], f"2/λ = {'η_c = ' * is_one}{limits[-1]:.3g}", "--")
    if critical and not is_one:
        _draw_limit(axes, middle, f"η_c = {middle:.3g}", ":")


def _draw_limit(axes: "Axes", rate: float, words: str, style: str) -> None:
    axes.axvline(rate, color=QUIET, linestyle=style, linewidth=1.4)
    axes.annotate(
        words, (rate, 0.96), (-5, 0), xycoords=axes.get_xaxis_transform(), textcoords="offset points", rotation=90,
        ha="right", va="top", color=QUIET, bbox=ON_PAPER,
    )  # fmt: skip


def _draw_best(axes: "Axes", learning_rate: float | None, objective: float, rate: float | None) -> None:
    if learning_rate and math.isfinite(objective):
        axes.plot(learning_rate, objective, "o", markersize=15, markerfacecolor="none",
                  markeredgecolor=INK, markeredgewidth=1.6, clip_on=False)  # fmt: skip
    if rate:
        axes.plot(rate, 0.0, "^", transform=axes.get_xaxis_transform(), color=INK, markersize=11, clip_on=False)
        axes.annotate(f"try {rate:.3g}", (rate, 0.0), (9, 6), xycoords=axes.get_xaxis_transform(),
                      textcoords="offset points", color=INK, bbox=ON_PAPER)  # fmt: skip


def _headline(jobs: Sequence[Job], averages: Sequence[Average], objective: str) -> str:
    """Names the best, where it is best by more than the noise of the validation rows, or of the seeds."""
    best: Job | Average = averages[0] if averages else jobs[0]
    equals: Sequence[Job | Average] = as_good_on_average(averages) if averages else as_good(jobs)
    values = [each.mean if isinstance(each, Average) else each.objective for each in equals]
    if not math.isfinite(values[0]):
        return f"No job has a {objective}" if not averages else f"No {objective} of every seed"
    if len(equals) > 1:
        return f"No clear best among {len(equals)}: {objective} {min(values):.4g} to {max(values):.4g}"
    keys = [key for key in varied_keys(jobs) if key in best.overrides]
    what = ", ".join(f"{key}={_short(best.overrides[key])}" for key in keys)
    spread = f" ± {averages[0].spread:.2g} over {len(averages[0].jobs)} seeds" if averages else ""
    return f"Best {objective} {values[0]:.4g}{spread}" + (f" at {what}" if what else "")


def _legend(axes: "Axes", jobs: Sequence[Job], several: bool) -> None:
    """What lines and symbols mean, below the picture, so that nothing covers a point."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels() if several else ([], [])
    statuses = {job.status for job in jobs if job.learning_rate}
    for status in (status for status in SYMBOLS if status in statuses):
        fill = QUIET if status == "diverged" else "none"
        look = {"markerfacecolor": fill, "markeredgecolor": QUIET, "markersize": 8}
        handles.append(Line2D([], [], linestyle="none", marker=SYMBOLS[status], **look))  # type: ignore[arg-type]
        labels.append(status)
    if handles:
        axes.figure.legend(handles, labels, loc="outside lower left", ncols=5, frameon=False, labelcolor=INK)


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


def draw_curves(jobs: Sequence[Job]) -> "Figure | None":
    """Draws the objective and the gradient norm against steps, a line a job; None if no job has a curve.

    Colours run from the least learning rate to the largest; the training rows' curve is dotted. At most `MOST_CURVES`
    jobs, evenly over the learning rates, the best among them.
    """
    from matplotlib import colormaps

    shown = _sample([job for job in jobs if any(job.curves.values())])
    if not shown:
        return None
    monitor, _ = judged_by(jobs)
    figure = new_figure(9.6, 4.8, layout="constrained")
    panels = zip(figure.subplots(1, 2), (monitor, "gradient norm"), (curve_tags(monitor), [GRADIENT_NORM]), strict=True)
    for axes, name, tags in panels:
        for index, job in enumerate(shown):
            color = colormaps["viridis"](0.1 + 0.65 * index / max(len(shown) - 1, 1))  # seen on a dark page, too
            for tag, line in zip(tags, ("-", ":"), strict=False):
                curve = {step: value for step, value in job.curves.get(tag, {}).items() if math.isfinite(value)}
                steps = sorted(curve)
                marker = "." if len(steps) < 3 else None
                label = _curve_name(job, jobs) if line == "-" else None
                axes.plot(steps, [curve[step] for step in steps], line, color=color, label=label, marker=marker)
        paint(axes)
        dotted = "".join(f" (dotted: {tag})" for tag in tags[1:] if any(tag in job.curves for job in shown))
        axes.set(xlabel="step", ylabel=f"{name}{dotted}")
        curves = [job.curves[tag] for job in shown for tag in tags if job.curves.get(tag)]
        begin = max((curve[min(curve)] for curve in curves), default=0.0)
        _scale_of_most(axes, [value for curve in curves for value in curve.values()], begin)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _sample(jobs: Sequence[Job]) -> list[Job]:
    ordered = _by_rate(jobs)
    if len(ordered) <= MOST_CURVES:
        return ordered
    step = (len(ordered) - 1) / (MOST_CURVES - 1)
    chosen = [ordered[round(index * step)] for index in range(MOST_CURVES)]
    if jobs[0] not in chosen:
        chosen[-2] = jobs[0]
    return _by_rate(chosen)


def _curve_name(job: Job, jobs: Sequence[Job]) -> str:
    keys = varied_keys(jobs)
    varied = [f"{key.rpartition('.')[2]}={_short(job.overrides.get(key, ''), 14)}" for key in keys[:MOST_KEYS]]
    more = ", …" * (len(keys) > MOST_KEYS)
    mark = "" if job.status == "completed" else f" ({job.status})"
    return (", ".join(varied) or _short(job.name)) + more + mark


def _scale_of_most(axes: "Axes", values: Sequence[float], begin: float = 0.0) -> None:
    """A logarithmic scale where it can be, on which a job that blew up rises and does not squeeze the others flat."""
    values = sorted(value for value in values if math.isfinite(value))
    if values and values[0] > 0:
        axes.set_yscale("log")
        axes.set_ylim(values[0] / 1.3, min(values[-1] * 1.3, max(values[len(values) // 2] * 100, begin * 30)))
        _scale(axes, "y", values)
