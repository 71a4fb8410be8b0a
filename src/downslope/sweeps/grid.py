"""A sweep's grid: what was typed is taken apart here, and which of its jobs are missing is told by their folders."""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from omegaconf import DictConfig, OmegaConf

from downslope.runs.command_line import typed
from downslope.runs.console import say
from downslope.runs.plain_files import check_regular
from downslope.runs.whole_files import whole_file
from downslope.sweeps.job import ENDED, KEY, check_identity, job_key, job_name, result_of

MISSING = "hydra_plugins.downslope_sweeper.MissingJobs"
SWEEPERS = (MISSING, "hydra._internal.core_plugins.basic_sweeper.BasicSweeper")  # those that run every combination
NAME = "${job_name:}"
MOST_JOBS = 100_000
MOST_LETTERS = 100_000


def typed_overrides(config: DictConfig) -> list[Override]:
    """Returns what a sweep was typed to be: `hydra.sweeper.params`, then the command line.

    Args:
        config: As Hydra's multirun has it.
    """
    sweeper: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    loader = GlobalHydra.instance().config_loader()
    return parsed(sweeper.get("params") or {}, typed(config.hydra.overrides.task), loader)


def parsed(params: Mapping[str, str], task: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Returns the overrides of `hydra.sweeper.params` and of a command line; without a loader they name no groups.

    Raises:
        ValueError: There are more than anybody types.
    """
    lines = [*(f"{key}={values}" for key, values in params.items()), *task]
    if sum(map(len, lines)) > MOST_LETTERS:
        raise ValueError(f"The overrides of a sweep must have at most {MOST_LETTERS:,} characters.")
    return OverridesParser.create(config_loader=loader).parse_overrides(lines)


def announced_jobs(sweeper: Mapping[str, Any], task: Sequence[str]) -> list[list[str]]:
    """Returns the jobs that `multirun.yaml` announces, none where its sweeper decides as it goes."""
    if sweeper.get("_target_") not in SWEEPERS:
        return []
    return jobs(parsed(sweeper.get("params") or {}, task), sweeper.get("points"))


def values(override: Override, points: int | None = None) -> list[str]:
    """Returns each value of an override, as an override.

    Args:
        override: As parsed.
        points: Of an interval; without, its two ends, between which some sweepers sample.

    Raises:
        ValueError: There are more than `MOST_JOBS`.
    """
    key, value = override.get_key_element(), override.value()
    if override.is_interval_sweep():
        return [f"{key}={each}" for each in points_of(override, points)]
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if isinstance(value, RangeSweep) and not abs(value.stop - value.start) <= MOST_JOBS * abs(value.step):  # type: ignore[operator]
        raise ValueError(f"`{key}` must have at most {MOST_JOBS:,} values, got {override.input_line}.")
    if isinstance(value, RangeSweep) and isinstance(value.step, float):  # 0.1 + 0.2 is 0.3 to whoever typed it
        return [f"{key}={float(each):.12g}" for each in override.sweep_string_iterator()]
    return [f"{key}={each}" for each in override.sweep_string_iterator()]


def points_of(override: Override, points: int | None) -> list[str]:
    """Returns so many values of an interval, evenly spaced, in as few digits as tell them apart, at least four.

    Raises:
        ValueError: It has no such points.
    """
    interval: Any = override.value()
    ends = [interval.start, interval.end]
    if points is None:
        return [str(end) for end in ends]
    if type(points) is not int or not 2 <= points <= MOST_JOBS:
        raise ValueError(f"`hydra.sweeper.points` must be a whole number from 2 to {MOST_JOBS:,}, got {points!r}.")
    is_log = "log" in interval.tags
    if not (all(map(math.isfinite, ends)) and ends[0] < ends[1] and (ends[0] > 0 or not is_log)):
        kind = "two numbers above 0" if is_log else "two numbers"
        raise ValueError(
            f"`{override.key_or_group}` must be an interval of {kind}, the smaller first, got {override.input_line}."
        )
    low, high = map(math.log, ends) if is_log else ends
    exact = [low + (high - low) * place / (points - 1) for place in range(points)]
    exact = [math.exp(each) for each in exact] if is_log else exact
    for digits in range(4, 17):
        shown = [f"{each:.{digits}g}" for each in exact]
        if len({*shown}) == points:
            break
    return shown


def jobs(overrides: Sequence[Override], points: int | None = None) -> list[list[str]]:
    """Returns every combination of the values; of a key that is typed twice the later ones count.

    Args:
        overrides: As parsed.
        points: Of each interval.

    Raises:
        ValueError: There are more than `MOST_JOBS`, or an interval without points, which has no end of values.
    """
    for override in overrides:
        if override.is_interval_sweep() and points is None:
            raise ValueError(
                f"`{override.key_or_group}` must be a list of values, got {override.input_line}; "
                "hydra.sweeper.points=100 takes that many values from the interval."
            )
    by_key = {override.get_key_element(): values(override, points) for override in overrides}
    sizes = [len(each) for each in by_key.values() if len(each) > 1]
    if (number := math.prod(sizes)) > MOST_JOBS:
        product = " × ".join(f"{size:,}" for size in sizes)
        raise ValueError(f"A sweep must have at most {MOST_JOBS:,} jobs, got {product} = {number:,}.")
    return [list(job) for job in itertools.product(*by_key.values())]


def missing_jobs(config: DictConfig) -> list[list[str]]:
    """Returns the overrides of each job of a grid that has not ended in the sweep's folder.

    Args:
        config: As Hydra's multirun has it.

    Raises:
        ValueError: The folder holds one of the jobs with another configuration.
    """
    grid = jobs(typed_overrides(config), config.hydra.sweeper.get("points"))
    if OmegaConf.to_container(config.hydra.sweep)["subdir"] != NAME:  # type: ignore[call-overload,index]
        return grid  # named by the user: each is composed, and kept when its turn comes
    folder, sources = Path(config.hydra.sweep.dir), sources_digest(config)
    return [job for job in grid if not _has_ended(folder / job_name(",".join(sorted(job))), job, config, sources)]


def batches(config: DictConfig, most: int | None) -> list[list[list[str]]]:
    """Returns the missing jobs, in batches of `most` where that is given, and says how many are kept."""
    missing, number = missing_jobs(config), len(jobs(typed_overrides(config), config.hydra.sweeper.get("points")))
    if kept := number - len(missing):
        say(f"kept {kept:,} of {number:,} jobs, which had already ended")
    size = most or number
    return [missing[start : start + size] for start in range(0, len(missing), size)]


def _has_ended(folder: Path, overrides: Sequence[str], config: DictConfig, sources: str) -> bool:
    """Tells whether a job has ended, after making sure that it is the same job; one that has is not even composed."""
    if not folder.exists():
        return False
    check_regular(folder)
    key, file = job_key(sources, overrides), folder / KEY
    if not (file.is_file() and file.read_bytes() == key.encode()):
        check_identity(GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides)), folder)
        if file.parent.is_dir():
            with whole_file(file) as stream:
                stream.write(key.encode())
    result = result_of(folder)
    return result is not None and result.status in ENDED


def sources_digest(config: DictConfig) -> str:
    """Returns a digest of every file that a configuration may be composed from, and of the primary one's name."""
    digest = hashlib.sha256(str(config.hydra.job.config_name).encode())
    for source in config.hydra.runtime.config_sources:
        if source.schema != "structured":
            folder = Path(str(files(source.path)) if source.schema == "pkg" else source.path)
            for file in sorted(folder.rglob("*.yaml")):
                digest.update(f"\n{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
