"""What a sweep was typed to be is taken apart in one place."""

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from downslope.sweeps.grid import MOST_JOBS, announced_jobs, jobs, parsed, values


def test_the_grid_is_hydras_own() -> None:
    typed = ["lr=0.1,0.2", "seed=range(3)", "+model.size='a b',c", "~scheduler", "lr=choice(1,2)", "name=x"]
    grid = jobs(OverridesParser.create().parse_overrides(typed))
    (hydras,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(typed), None)
    assert [[each.replace("~scheduler=null", "~scheduler") for each in job] for job in hydras] == grid
    assert len(grid) == 2 * 3 * 2
    assert grid[0] == ["lr=1", "seed=0", "+model.size='a b'", "~scheduler", "name=x"]


def test_an_interval_is_shown_by_its_two_ends_and_is_no_grid() -> None:
    (override,) = parsed({}, ["lr=tag(log,interval(0.1,1))"])
    assert values(override) == ["lr=0.1", "lr=1.0"]
    with pytest.raises(ValueError, match="`lr` must be a list of values"):
        jobs([override])


def test_a_range_has_the_numbers_that_its_user_would_write() -> None:
    assert jobs(parsed({}, ["lr=range(0.1,0.5,0.1)"])) == [["lr=0.1"], ["lr=0.2"], ["lr=0.3"], ["lr=0.4"]]
    assert jobs(parsed({}, ["seed=range(9007199254740993,9007199254740995)"]))[0] == ["seed=9007199254740993"]


@pytest.mark.parametrize(
    "typed",
    [
        ["lr=range(1e12)"],
        ["lr=shuffle(range(1e12))"],
        [f"k{index}=range(100)" for index in range(9)],
        ["a=" + "1," * 10**5],
    ],
)
def test_more_jobs_than_anybody_runs_are_refused_at_once(typed: list[str]) -> None:
    with pytest.raises(ValueError, match="must have at most"):
        jobs(parsed({}, typed))


def test_a_sweeper_that_decides_as_it_goes_announces_nothing() -> None:
    mine = "hydra_plugins.downslope_sweeper.MissingJobs"
    assert announced_jobs({"_target_": "hydra_plugins.optuna"}, ["lr=1,2"]) == []
    assert announced_jobs({"_target_": mine, "params": {"seed": "1,2"}}, ["lr=3"]) == [
        ["seed=1", "lr=3"],
        ["seed=2", "lr=3"],
    ]
    assert MOST_JOBS >= 1000
