"""Which job is best, and is it by more than chance?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from downslope.sweeps.table import Job, judged_by, varied_keys

SEED = "seed"
CERTAIN = 2.0  # standard errors
NOISE = 1.5  # chosen so that of ten jobs that are called the best nine are: scripts/laboratory/benchmarks/rules.py


@dataclass(frozen=True)
class Average:
    """The jobs that differ in their seed alone.

    Attributes:
        overrides: What they share, of the overrides that were varied.
        jobs: By seed.
        mean: Of their objectives; not finite where one has none.
        spread: The standard deviation of these.
    """

    overrides: Mapping[str, str]
    jobs: Mapping[str, Job]
    mean: float
    spread: float

    @property
    def learning_rate(self) -> float | None:
        """The rate of all of them."""
        return next(iter(self.jobs.values())).learning_rate


def over_seeds(jobs: Sequence[Job]) -> list[Average]:
    """Returns what was tried with several seeds, the best mean first; nothing where the seed was not varied."""
    keys = varied_keys(jobs)
    if SEED not in keys:
        return []
    groups: dict[tuple[str, ...], dict[str, Job]] = {}
    others = [key for key in keys if key != SEED]
    for job in jobs:
        groups.setdefault(tuple(job.overrides.get(key, "") for key in others), {})[job.overrides.get(SEED, "")] = job
    averages = []
    for shared, members in groups.items():
        found = [job.objective for job in members.values()]
        spread = stdev(found) if len(found) > 1 and all(map(math.isfinite, found)) else math.nan
        averages.append(Average(dict(zip(others, shared, strict=True)), members, fmean(found), spread))
    sign = 1 if judged_by(jobs)[1] == "min" else -1
    return sorted(averages, key=lambda each: sign * each.mean if math.isfinite(each.mean) else math.inf)


def rows_over_seeds(averages: Sequence[Average], monitor: str) -> list[dict[str, Any]]:
    """Returns what a table says of them, by column."""
    return [
        {**each.overrides, "seeds": len(each.jobs), f"mean {monitor}": each.mean, "standard deviation": each.spread}
        | {"lowest": min(found), "highest": max(found)}
        for each in averages
        for found in [[job.objective for job in each.jobs.values()]]
    ]


def as_good(jobs: Sequence[Job]) -> list[Job]:
    """Returns the best job, and those that are worse by no more than the noise of the validation rows.

    Of n rows that noise is 1.5 L/√n for a job's mean loss L, and 1.5 √(p(1 − p)/n) for its share p of hits. Where n is
    not known, the best is alone. How often that is right: docs/sweeps.md.

    Args:
        jobs: The best first.
    """
    best = jobs[0]
    rows = (best.result.num_validation_rows if best.result else None) or 0
    is_share = judged_by(jobs)[1] == "max" and 0 <= best.objective <= 1

    def is_as_good(value: float) -> bool:
        spread = math.sqrt(max(0.0, value * (1 - value))) if is_share else abs(value)
        noise = NOISE * spread / math.sqrt(rows) if rows > 0 else 0.0
        return math.isfinite(value) and abs(value - best.objective) <= noise

    return [job for job in jobs if job is best or is_as_good(job.objective)]


def as_good_on_average(averages: Sequence[Average]) -> list[Average]:
    """Returns the best mean, and those that differ from it by less than two standard errors, seed by seed."""
    best = averages[0]
    return [each for each in averages if each is best or not _differs(best, each)]


def _differs(best: Average, other: Average) -> bool:
    if not math.isfinite(other.mean):
        return True
    pairs = [(best.jobs[seed], other.jobs[seed]) for seed in best.jobs if seed in other.jobs]
    gaps = [other.objective - best.objective for best, other in pairs]
    if all(min(job.objective for job in pair) > 0 for pair in pairs):  # a loss may be a thousand times another
        gaps = [math.log(other.objective / best.objective) for best, other in pairs]
    return len(gaps) > 1 and abs(fmean(gaps)) > CERTAIN * stdev(gaps) / math.sqrt(len(gaps))
