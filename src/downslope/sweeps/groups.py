"""Which jobs of a sweep differ only in numbers of the optimizer; each such group is composed once."""

import re
from ast import literal_eval
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from downslope.runs.configuration import hydra_config
from downslope.sweeps import table
from downslope.sweeps.grid import NAME
from downslope.sweeps.job import begun, job_name
from downslope.sweeps.stacked import CannotStackError

Jobs = dict[int, list[str]]  # the overrides of each, by its number in the sweep

NUMBER = r"[+-]?(?:(?:0|[1-9][\d_]*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"  # as Hydra and Python both read it
VALUE = re.compile(rf"{NUMBER}|\[{NUMBER}(?:,\s*{NUMBER})*\]")
CLIP = "trainer.gradient_clip_val"
OURS, MAY_RAISE = "downslope.callbacks.", "downslope.callbacks.GradientCheck"
LOGGER = "downslope.logs.tensorboard.TensorBoard"
JOB, FOLDER = 987654321, "/OUTPUT/FOLDER/HERE"  # stand for a job's number and folder


@dataclass
class Group:
    """Jobs that are composed alike but for a few numbers of the optimizer.

    Attributes:
        jobs: At least two.
        keys: What differs.
        config: Of the first job, with Hydra's own node.
        texts: The files in `.hydra`, with a marker for each key.
        arguments: Of the optimizer: which key each comes from.
    """

    jobs: Jobs
    keys: list[str]
    config: DictConfig
    texts: dict[str, str]
    arguments: dict[str, str]

    def members(self) -> dict[str, Any]:
        """Returns what `Members` takes beside the module."""
        values = [by_key(job) for job in self.jobs.values()]
        settings = [{name: literal_eval(each[key]) for name, key in self.arguments.items()} for each in values]
        clip = self.config.trainer.get("gradient_clip_val") or 0
        clips = [literal_eval(each[CLIP]) if CLIP in self.keys else clip for each in values]
        monitor = OmegaConf.select(self.config, "callbacks.gradient_monitor") or {}
        due = {name: monitor[name] for name in ("every_n_steps", "num_first_steps") if name in monitor}
        by_value = self.config.trainer.get("gradient_clip_algorithm") == "value"
        return {"settings": settings, "clips": clips, "clips_values": by_value, **due}

    def folder(self, place: int) -> str:
        """Returns the name of a job's folder."""
        return job_name(",".join(sorted(self.jobs[place])))

    def files(self, place: int, folder: Path) -> dict[str, str]:
        """Returns the files in `.hydra` of the job with this number."""
        job, told = by_key(self.jobs[place]), {str(JOB): str(place), FOLDER: str(folder)}
        for index, key in enumerate(self.keys):
            shown = yaml.safe_dump(literal_eval(job[key]), default_flow_style=True)
            told |= {f"={marker(index)}": f"={job[key]}", marker(index): shown.removesuffix("...\n").rstrip("\n")}
        return {name: reduce(lambda text, each: text.replace(*each), told.items(), text)
                for name, text in self.texts.items()}  # fmt: skip


def marker(index: int) -> str:
    """Stands in a composed configuration for a value that differs from job to job."""
    return f"DIFFERS{index}HERE"


def by_key(job: Sequence[str]) -> dict[str, str]:
    """Splits overrides into key and value; `+` says only that the key is new."""
    return {key.lstrip("+"): value for key, value in table.by_key(job).items()}


def groups(config: DictConfig, sweep: Path, jobs: Jobs, rest: dict[str, Jobs]) -> Iterator[Group]:
    """Yields jobs that can be trained at once, and puts all others into `rest`, by the reason."""
    reason = "they have already started"
    if OmegaConf.to_container(config.hydra.sweep)["subdir"] != NAME:  # type: ignore[call-overload,index]
        reason, started = "their folders have names of your own: hydra.sweep.subdir", jobs
    else:
        started = {place: job for place, job in jobs.items() if begun(sweep / job_name(",".join(sorted(job))))}
    if started:
        rest[reason] = started
    fresh = {place: job for place, job in jobs.items() if place not in started}
    told = {place: by_key(job) for place, job in fresh.items()}
    keys = list(dict.fromkeys(key for job in told.values() for key in job))
    varied = [key for key in keys if len({job.get(key) for job in told.values()}) > 1]
    numeric = [key for key in varied if all(VALUE.fullmatch(job.get(key, "")) for job in told.values())]
    yield from _split(config, fresh, [key for key in keys if key not in numeric], numeric, rest)


def _split(
    config: DictConfig, jobs: Jobs, same: Sequence[str], differ: Sequence[str], rest: dict[str, Jobs]
) -> Iterator[Group]:
    """Groups jobs by their values of some keys; a key that cannot differ within a group becomes one of these."""
    alike: dict[tuple[str | None, ...], Jobs] = {}
    for place, job in jobs.items():
        alike.setdefault(tuple(by_key(job).get(key) for key in same), {})[place] = job
    for group in alike.values():
        varied = [key for key in differ if len({by_key(job)[key] for job in group.values()}) > 1]
        if len(group) == 1 or not varied:
            reason = "no other job differs from them only in numbers of the optimizer"
            rest.setdefault(reason, {}).update(group)
            continue
        try:
            composed, stuck = _compose(config, group, varied)
        except CannotStackError as error:
            rest.setdefault(str(error), {}).update(group)
            continue
        if composed:
            yield composed
        else:
            yield from _split(config, group, [*same, *stuck], [key for key in varied if key not in stuck], rest)


def _compose(config: DictConfig, jobs: Jobs, keys: list[str]) -> tuple[Group | None, list[str]]:
    """Composes once for all, with a marker for each key; or returns the keys that not only the optimizer depends on."""
    loader = GlobalHydra.instance().config_loader()
    first = next(iter(jobs.values()))
    marks = {key: marker(index) for index, key in enumerate(keys)}
    marked = [
        f"{each.partition('=')[0]}={marks.get(by_key([each]).popitem()[0], each.partition('=')[2])}" for each in first
    ]
    both = [loader.load_sweep_config(config, overrides) for overrides in (marked, first)]
    for each in both:
        with open_dict(each), read_write(each):
            each.hydra.job.id, each.hydra.job.num, each.hydra.runtime.output_dir = str(JOB), JOB, FOLDER
    template, own = both
    with hydra_config(template):
        leaves = dict(_leaves(OmegaConf.to_container(without_hydra(template), resolve=True)))
    arguments: dict[str, str] = {}
    stuck = []
    for key, mark in marks.items():
        paths = [path for path, value in leaves.items() if mark in str(value)]
        used = [path for path in paths if path.split(".")[-2:-1] == ["optimizer"] and leaves[path] == mark]
        if set(paths) - {*used, key} or not (key in ("lr", *used) or key == CLIP) or not (used or key == CLIP):
            stuck.append(key)
        arguments |= {path.rpartition(".")[2]: key for path in used}
    if stuck:
        return None, stuck
    _check(own)
    hydra = OmegaConf.create({"hydra": template.hydra})
    contents = {"config": without_hydra(template), "hydra": hydra, "overrides": OmegaConf.create(marked)}
    texts = {f"{name}.yaml": OmegaConf.to_yaml(content) for name, content in contents.items()}
    group = Group(jobs, keys, own, texts, arguments)
    if yaml.safe_load(group.files(next(iter(jobs)), Path())["config.yaml"]) != yaml.safe_load(
        OmegaConf.to_yaml(without_hydra(own))
    ):
        return None, keys
    return group, []


def without_hydra(config: DictConfig) -> DictConfig:
    """Returns what is the run's own of a configuration."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _check(config: DictConfig) -> None:
    """Raises for a configuration that does more than a stacked fit can."""
    odd = [f"trainer.{key}" for key, node in config.trainer.items() if OmegaConf.is_config(node)]  # a profiler, say
    targets = {f"callbacks.{key}": str(node._target_) for key, node in config.callbacks.items()}
    odd += [key for key, target in targets.items() if not target.startswith(OURS) or target == MAY_RAISE]
    odd += [f"logger.{key}" for key, node in config.logger.items() if node._target_ != LOGGER]
    if odd:
        raise CannotStackError(f"the vectorized launcher does not support {', '.join(odd)}")
    if (config.monitor, config.mode) != ("val/loss", "min"):
        raise CannotStackError(f"it judges jobs by the lowest val/loss, not by monitor={config.monitor}")
