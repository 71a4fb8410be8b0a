"""The jobs of a sweep that differ only in numbers of the optimizer, trained at once; each is a job like any other."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.utils import get_method
from omegaconf import DictConfig

from downslope.runs.configuration import hydra_config
from downslope.runs.console import explain, one_line, say
from downslope.runs.log import early_log, hear_lightning
from downslope.sweeps.groups import Group, Jobs, groups, without_hydra
from downslope.sweeps.keeping import fail, keep, remove_leftovers
from downslope.sweeps.members import num_parameters, train_members
from downslope.sweeps.process import isolated
from downslope.sweeps.stacked import CannotStackError

Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]
MOST_BYTES, COPIES = 2**30, 12  # of weights, gradients, states of the optimizer, what `backward` keeps
MOST_MEMBERS = 2048  # torch compares each parameter group with all before it; and a kill loses the part in hand


def launch(config: DictConfig, jobs: Sequence[Sequence[str]], first: int, one_by_one: Launch) -> list[JobReturn]:
    """Trains what can be trained at once, and has the rest run by the ordinary launcher.

    Args:
        config: Of the sweep.
        jobs: The overrides of each.
        first: The number of the first of them.
        one_by_one: Runs jobs as any launcher does.

    Returns:
        The objective of each job, as Hydra's launchers return it.
    """
    setup_globals()
    sweep = Path(config.hydra.sweep.dir).absolute()
    sweep.mkdir(parents=True, exist_ok=True)
    remove_leftovers(sweep)
    numbered: Jobs = {number: list(job) for number, job in enumerate(jobs, start=first)}
    returns: dict[int, JobReturn] = {}
    rest: dict[str, Jobs] = {}
    for group in groups(config, sweep, numbered, rest):
        try:
            for number, objective in _train(group, sweep).items():
                returns[number] = JobReturn(status=JobStatus.COMPLETED, _return_value=objective)
        except CannotStackError as error:
            rest.setdefault(str(error), {}).update(group.jobs)
    for reason, left in rest.items():
        say(f"{len(left):,} of {len(jobs):,} jobs run one by one: {one_line(reason)}")
    for number in sorted(number for left in rest.values() for number in left):
        returns[number] = one_by_one([numbered[number]], number)[0]
    return [returns[number] for number in numbered]


def _train(group: Group, sweep: Path) -> dict[int, float]:
    """Trains a group, in as many parts as fit into memory; returns each job's objective."""
    config, build = group.config, get_method(group.config.hydra.callbacks.gate.build)
    names = ", ".join(group.keys)
    say(f"\n{len(group.jobs):,} jobs at once, which differ in {names}")
    with isolated(), hydra_config(config), early_log():
        hear_lightning()
        os.chdir(config.hydra.runtime.cwd)
        torch.set_num_threads(1)  # two take fifty times as long for products as small as these
        try:
            num_bytes = 4 * num_parameters(without_hydra(config), build)
        except Exception as error:  # what one job says, all would
            return fail(group, sweep, error)
        size = max(2, min(MOST_MEMBERS, MOST_BYTES // (COPIES * num_bytes)))
        places = list(group.jobs)
        if size < len(places):
            say(f"in parts of {size:,}, at most {size * COPIES * num_bytes / 2**20:,.1f} MiB at a time")
        objectives: dict[int, float] = {}
        for start in range(0, len(places), size):
            part = replace(group, jobs={place: group.jobs[place] for place in places[start : start + size]})
            try:
                fit = train_members(without_hydra(config), build, part.members())
            except CannotStackError:
                raise
            except Exception as error:  # of the fit of all: each job may do without what failed there
                raise CannotStackError(f"they cannot be trained at once: {explain(error)}") from error
            objectives |= keep(part, sweep, fit)
    return objectives
