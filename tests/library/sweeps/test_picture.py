"""The pictures are read back from what matplotlib was told to draw, and drawn."""

import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from downslope.pictures.style import png
from downslope.sweeps.picture import MOST_CURVES, MOST_LINES, draw_curves, draw_learning_rate
from downslope.sweeps.table import read_jobs
from tests.library.sweeps.conftest import MakeJob


def drawn(sweep: Path) -> Axes:
    """The axes, after a real drawing: warnings are errors there too."""
    figure = draw_learning_rate(read_jobs(sweep))
    assert png(figure).startswith(b"\x89PNG")
    (axes,) = figure.axes
    return axes


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True) if x == x]


def marked(axes: Axes, marker: str) -> list[tuple[float, float]]:
    return [point for line in axes.lines if line.get_marker() == marker for point in points(line)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_line_a_device_with_what_diverged_and_failed_at_the_top_edge(four_jobs: Path) -> None:
    axes = drawn(four_jobs)
    last = next(line for line in axes.lines if line.get_label() == "device=cpu")
    assert points(last) == [(0.1, 0.5), (0.2, 0.4)]
    assert [rate for rate, _ in marked(axes, "X")] == [0.4]
    assert [rate for rate, _ in marked(axes, "s")] == [0.1]
    assert all(height >= 1 for _, height in marked(axes, "X") + marked(axes, "s"))
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert isinstance(axes.figure, Figure)
    assert legend(axes.figure) == ["device=cpu", "device=gpu", "diverged", "failed"]
    assert axes.get_title(loc="left") == "Best val/loss 0.4 at lr=0.2, device=cpu"


def test_the_limit_and_the_suggested_rate_stand_where_they_are(four_jobs: Path) -> None:
    axes = drawn(four_jobs)
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [0.25]  # type: ignore[index]
    assert marked(axes, "^") == [(0.15, 0.0)]
    assert [text.get_text() for text in axes.texts] == ["2/λ = 0.25", "try 0.15"]


def test_without_a_suggestion_or_a_limit_nothing_is_marked(make_job: MakeJob, sweep: Path) -> None:
    make_job("lr=0.1", status="completed", loss=0.5)
    axes = drawn(sweep)
    assert marked(axes, "^") == []
    assert list(axes.texts) == []


def test_an_objective_that_may_be_negative_stands_on_a_linear_axis_under_its_name(
    make_job: MakeJob, sweep: Path
) -> None:
    for rate, objective in ((0.1, -2.5), (0.2, 0.5)):
        make_job(f"lr={rate}", lr=rate, status="completed", objective=objective, monitor="val/log_likelihood")
    make_job("lr=0.4", lr=0.4, status="failed")
    (axes,) = draw_learning_rate(read_jobs(sweep)).axes
    assert points(axes.lines[0]) == [(0.1, -2.5), (0.2, 0.5)]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert axes.get_ylabel() == "val/log_likelihood"
    assert axes.get_title(loc="left") == "Best val/log_likelihood -2.5 at lr=0.1"


def test_one_job_all_failed_and_no_job_with_a_rate_are_drawn_too(make_job: MakeJob, sweep: Path) -> None:
    failed = make_job("lr=0.1", status="failed", error={"type": "E", "message": ""})
    assert drawn(sweep).get_title(loc="left") == "No job has a val/loss"
    (failed / "result.json").write_text("{")
    (failed / ".hydra" / "config.yaml").unlink()
    assert marked(drawn(sweep), "s") == []


def test_a_sweep_over_something_else_has_a_line_a_value(make_job: MakeJob, sweep: Path) -> None:
    for size in ("8", "64"):
        make_job(f"data.batch_size={size}", status="completed", loss=1 / float(size))
    axes = drawn(sweep)
    assert [points(line) for line in axes.lines if str(line.get_label()).startswith("data.")] == [
        [(0.1, 1 / 64)],
        [(0.1, 1 / 8)],
    ]


@pytest.mark.parametrize("value", ["$\\frac{$", "_hidden", "größer^2", "'a=b'", "x" * 300, "a\nb"])
def test_odd_values_are_drawn_as_they_stand(make_job: MakeJob, sweep: Path, value: str) -> None:
    curves = {"val/loss": {1: 1.0, 2: 0.5}}
    make_job("lr=0.1", f"data.path={value}", status="completed", loss=0.5, curves=curves)
    make_job("lr=0.1", "data.path=other", status="completed", loss=0.6, curves=curves)
    axes = drawn(sweep)
    assert isinstance(axes.figure, Figure)
    assert any(value[:20] in label.replace("\\$", "$") for label in legend(axes.figure))
    figure = draw_curves(read_jobs(sweep))
    assert figure
    assert png(figure).startswith(b"\x89PNG")


def test_many_lines_are_one_with_gaps_and_none_is_lost(make_job: MakeJob, sweep: Path) -> None:
    for size in range(MOST_LINES + 1):
        for rate in (0.1, 0.2):
            status = "diverged" if size == 3 and rate == 0.2 else "completed"
            make_job(f"lr={rate}", f"data.batch_size={size}", lr=rate, status=status, loss=1.0 + size)
    axes = drawn(sweep)
    (line,) = (line for line in axes.lines if line.get_label() == "8 lines: data.batch_size")
    assert len(points(line)) == 2 * (MOST_LINES + 1) - 1
    assert sum(x != x for x in line.get_xdata()) == MOST_LINES + 1
    assert [rate for rate, _ in marked(axes, "X")] == [0.2]


def test_the_curves_are_a_line_a_job_from_the_least_rate_to_the_largest(four_jobs: Path) -> None:
    figure = draw_curves(read_jobs(four_jobs))
    assert figure
    losses, norms = figure.axes
    assert (losses.get_ylabel(), norms.get_ylabel()) == ("val/loss", "gradient norm")
    assert legend(figure) == ["lr=0.1, device=cpu", "lr=0.2, device=cpu"]
    (loss, *_), norm = losses.lines, norms.lines[1]
    assert points(loss) == [(1, pytest.approx(0.9)), (2, pytest.approx(0.3)), (3, pytest.approx(0.5))]
    assert points(norm) == [(1, 1.0), (3, pytest.approx(0.1))]
    assert losses.get_yscale() == norms.get_yscale() == "log"


def test_the_curve_of_the_training_rows_is_dotted_and_one_that_blew_up_leaves_the_others_their_height(
    make_job: MakeJob, sweep: Path
) -> None:
    falling = {step: 1.0 / step for step in range(1, 9)}
    make_job("lr=0.1", status="completed", loss=0.1, curves={"val/loss": falling, "train/loss": falling})
    make_job("lr=9", lr=9, status="diverged", curves={"val/loss": {1: 1.0, 2: 1e12}})
    figure = draw_curves(read_jobs(sweep))
    assert figure
    axes = figure.axes[0]
    assert [points(line)[:2] for line in axes.lines if line.get_linestyle() == ":" and points(line)] == [
        [(1, 1.0), (2, 0.5)]
    ]
    assert axes.get_ylim()[1] < 1000
    assert legend(figure) == ["lr=0.1", "lr=9 (diverged)"]


def test_the_curves_stay_few_and_keep_the_best(make_job: MakeJob, sweep: Path) -> None:
    for index in range(40):
        make_job(f"lr={index + 1}", lr=index + 1, status="completed", loss=2.0 if index != 18 else 1.0,
                 curves={"val/loss": {1: 1.0}})  # fmt: skip
    figure = draw_curves(read_jobs(sweep))
    assert figure
    assert len(legend(figure)) == MOST_CURVES
    assert {"lr=1", "lr=19", "lr=40"} <= set(legend(figure))


def test_without_curves_no_curves_are_drawn(make_job: MakeJob, sweep: Path) -> None:
    make_job("lr=0.1", status="failed")
    assert draw_curves(read_jobs(sweep)) is None


def test_a_dense_line_is_a_curve_with_its_best_region_and_where_it_diverges(make_job: MakeJob, sweep: Path) -> None:
    """By hand: (1 + (ln 10·lr)²) is within 5 % of its least up to |ln 10·lr| = √0.05."""
    for index in range(100):
        rate = 10 ** (index / 25 - 3)
        loss = 1 + math.log(10 * rate) ** 2
        status = "diverged" if rate > 2 else "completed"
        make_job(f"lr={rate}", lr=rate, status=status, loss=loss, critical_learning_rate=1.5)
    axes = drawn(sweep)
    assert marked(axes, "X") == []
    diverging, good = sorted(text.get_text() for text in axes.texts if "\n" in text.get_text())
    assert diverging == "17 diverge,\nfrom 2.09 on"
    assert good == "within 5% of the best:\n0.0832 to 0.12"
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [1.5]  # type: ignore[index]


def test_a_dense_grid_of_two_numbers_is_a_map(make_job: MakeJob, sweep: Path) -> None:
    for row in range(9):
        for column in range(9):
            status = "diverged" if column + row > 14 else "completed"
            momentum, rate = row / 10, 2.0**column
            make_job(f"lr={rate}", f"m={momentum}", lr=rate, status=status, loss=1.0 + abs(column - 4) + row)
    figure = draw_learning_rate(read_jobs(sweep))
    assert png(figure).startswith(b"\x89PNG")
    axes, colours = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), colours.get_ylabel()) == (
        "learning rate",
        "m",
        "val/loss (grey: not completed)",
    )
    ended_badly, table = (mesh.get_array() for mesh in axes.collections[:2])
    assert ended_badly.count() == 3  # of 81 those with column + row of 15 and 16
    assert table.count() == 78
    assert marked(axes, "o") == [(16.0, 0.0)]
