"""By hand: means, spreads and what is left of a difference beside the noise."""

import math

import pytest

from downslope.sweeps.comparison import as_good, as_good_on_average, over_seeds
from downslope.sweeps.picture import draw_learning_rate
from downslope.sweeps.report import make_report
from downslope.sweeps.table import read_jobs
from tests.library.sweeps.conftest import MakeJob, Path


@pytest.fixture
def seeds(make_job: MakeJob, sweep: Path) -> Path:
    """Three seeds of two rates, apart by 0.1 at each seed; of a third one diverges."""
    for seed, loss in enumerate((1.0, 2.0, 3.0)):
        make_job("lr=0.1", f"seed={seed}", lr=0.1, status="completed", loss=loss)
        make_job("lr=0.2", f"seed={seed}", lr=0.2, status="completed", loss=loss + 0.1 + 0.01 * seed)
        status = "diverged" if seed else "completed"
        make_job("lr=0.4", f"seed={seed}", lr=0.4, status=status, loss=0.5)
    return sweep


def test_what_differs_in_its_seed_alone_has_a_mean_and_a_spread(seeds: Path) -> None:
    best, second, broken = over_seeds(read_jobs(seeds))
    assert (best.overrides, best.mean, best.spread) == ({"lr": "0.1"}, 2.0, 1.0)
    assert (second.learning_rate, second.mean) == (0.2, pytest.approx(2.11))
    assert broken.mean == math.inf
    assert set(best.jobs) == {"0", "1", "2"}


def test_a_difference_that_every_seed_has_is_one_however_far_the_seeds_are_apart(seeds: Path) -> None:
    averages = over_seeds(read_jobs(seeds))
    assert as_good_on_average(averages) == averages[:1]  # logarithms of 1.1, 1.055 and 1.04: 0.062 ± 0.017
    (axes,) = draw_learning_rate(read_jobs(seeds)).axes
    assert axes.get_title(loc="left") == "Best val/loss 2 ± 1 over 3 seeds at lr=0.1"
    page = make_report(seeds).page.read_text()
    assert "Over seeds" in page
    assert "<td>2</td><td>1</td><td>1</td><td>3</td>" in page


def test_a_difference_that_changes_sign_with_the_seed_is_none(make_job: MakeJob, sweep: Path) -> None:
    for seed, loss in enumerate((1.0, 2.0, 3.0)):
        make_job("lr=0.1", f"seed={seed}", lr=0.1, status="completed", loss=loss)
        make_job("lr=0.2", f"seed={seed}", lr=0.2, status="completed", loss=4.1 - loss)
    averages = over_seeds(read_jobs(sweep))
    assert len(as_good_on_average(averages)) == 2
    (axes,) = draw_learning_rate(read_jobs(sweep)).axes
    assert axes.get_title(loc="left") == "No clear best among 2: val/loss 2 to 2.1"


@pytest.mark.parametrize(("rows", "mode", "expected"), [(None, "min", 1), (100, "min", 2), (10_000, "min", 1)])
def test_what_validation_rows_cannot_tell_apart_is_as_good(
    make_job: MakeJob, sweep: Path, rows: int | None, mode: str, expected: int
) -> None:
    for rate, loss in ((0.1, 0.5), (0.2, 0.54), (0.4, 0.6)):  # 1.5 · 0.54/√100 = 0.08, 1.5 · 0.6/√100 = 0.09
        make_job(f"lr={rate}", lr=rate, status="completed", loss=loss, num_validation_rows=rows, mode=mode)
    jobs = read_jobs(sweep)
    assert len(as_good(jobs)) == expected
    (axes,) = draw_learning_rate(jobs).axes
    is_clear = axes.get_title(loc="left") == "Best val/loss 0.5 at lr=0.1"
    assert is_clear == (expected == 1)


def test_shares_of_hits_are_held_against_their_own_noise(make_job: MakeJob, sweep: Path) -> None:
    for rate, share in ((0.1, 0.9), (0.2, 0.88), (0.4, 0.82)):  # 1.5 · √(0.88 · 0.12 / 100) = 0.05, of 0.82 0.06
        accuracy = {"objective": share, "monitor": "val/accuracy", "mode": "max", "num_validation_rows": 100}
        make_job(f"lr={rate}", lr=rate, status="completed", **accuracy)
    assert [job.learning_rate for job in as_good(read_jobs(sweep))] == [0.1, 0.2]


def test_a_column_that_is_the_same_in_every_row_stands_above_the_table(make_job: MakeJob, sweep: Path) -> None:
    for rate in (0.1, 0.2):
        make_job(f"lr={rate}", "data.batch_size=8", lr=rate, status="completed", loss=rate, num_optimizer_steps=7)
    page = make_report(sweep).page.read_text()
    assert "The same in every job: data.batch_size 8, status completed, steps 7" in page
    header = page[page.index("<thead>") : page.index("</thead>")]
    assert "val/loss" in header
    assert not any(name in header for name in ("steps", "status", "data.batch_size"))
