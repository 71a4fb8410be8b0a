"""What the jobs of a stacked fit leave behind: the files that each would have left alone."""

import contextlib
import os
import secrets
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tensorboard.compat.proto.event_pb2 import Event
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard.summary import custom_scalars

from downslope.logs.event_files import encoded, encoded_scalars
from downslope.logs.hparams import hparams_line
from downslope.logs.tensorboard import LAYOUT, with_logarithms
from downslope.runs.checkpoints import BEST, LAST, as_bytes, name_of
from downslope.runs.console import one_line, say
from downslope.runs.folder import LOCK
from downslope.runs.result import FILE_NAME, Result, objective_of
from downslope.runs.run import first_result, line_of, num_rows
from downslope.sweeps.groups import Group
from downslope.sweeps.job import KEY, SOURCES, begun, failure, job_key
from downslope.sweeps.members import Fit, of_member
from downslope.verdict.thresholds import Thresholds

UNFINISHED = ".vectorized-"  # begins the name of a folder in which those of the jobs are written


def remove_leftovers(sweep: Path) -> None:
    """Removes what a vectorized sweep that was killed had not brought to its place."""
    for folder in sweep.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(Timeout), FileLock(folder / LOCK, blocking=False):
            shutil.rmtree(folder)


def keep(group: Group, sweep: Path, fit: Fit) -> dict[int, float]:
    """Writes the folders of all jobs, and returns their objectives.

    They are written apart, flushed to the disk once, and brought to their places then: a kill leaves each job as whole
    as one that has ended, or as one that has not begun.
    """
    results = _results(group, fit)
    event_file = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.0"

    def files() -> Iterator[dict[str, bytes]]:  # of one job at a time: those of all might not fit into memory
        for index, (result, curves) in enumerate(zip(results, _curves(fit), strict=True)):
            mine = _checkpoints(fit, index, result) if fit.checkpoint else {}
            if group.config.logger:
                step = max(result.num_optimizer_steps, int(fit.members.stopped_at[index]))  # beside test/loss
                mine[event_file] = curves + hparams_line(*line_of(result), step)
            yield mine

    return _place(group, sweep, results, files())


def fail(group: Group, sweep: Path, error: Exception) -> dict[int, float]:
    """Writes into each job's folder why none of them can run."""
    known = replace(first_result(group.config, []), error=failure(error).error)
    say(f"  failed    {one_line(known.error['message'] if known.error else '')}")
    results = [replace(known, overrides=job) for job in group.jobs.values()]
    return _place(group, sweep, results, [{} for _ in results])


def _place(group: Group, sweep: Path, results: list[Result], files: Iterable[dict[str, bytes]]) -> dict[int, float]:
    unfinished = sweep / f"{UNFINISHED}{secrets.token_hex(4)}"
    unfinished.mkdir()
    with FileLock(unfinished / LOCK):
        for (place, job), result, contents in zip(group.jobs.items(), results, files, strict=True):
            folder = unfinished / group.folder(place)
            texts = {f".hydra/{name}": text for name, text in group.files(place, sweep / folder.name).items()}
            if sources := group.config.hydra.job.env_set.get(SOURCES):
                texts[KEY] = job_key(sources, job)
            texts[FILE_NAME] = result.json()
            contents |= {name: text.encode() for name, text in texts.items()}
            folder.mkdir()
            for name in {name.partition("/")[0] for name in contents if "/" in name}:
                (folder / name).mkdir()
            for name, content in contents.items():
                (folder / name).write_bytes(content)
        os.sync()
        for place in group.jobs:
            _bring(unfinished / group.folder(place), sweep / group.folder(place))
        shutil.rmtree(unfinished)
    objectives = [objective_of(result, result.mode) for result in results]
    return dict(zip(group.jobs, objectives, strict=True))


def _bring(folder: Path, target: Path) -> None:
    """Takes the place of a job that has failed or was killed; not of one that another process has ended, or runs."""
    if target.exists():
        try:
            with FileLock(target / LOCK, blocking=False):
                if begun(target):
                    return
                shutil.rmtree(target)
        except Timeout:
            return
    folder.replace(target)


def _results(group: Group, fit: Fit) -> list[Result]:
    members = fit.members
    known = first_result(group.config, [])
    known.seconds, known.device = fit.seconds / len(group.jobs), str(fit.trainer.strategy.root_device)
    known.critical_learning_rate = fit.critical_learning_rate
    known.num_validation_rows = num_rows(fit.trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
    line, excess, first_excess = fit.line, None, None
    if line is not None:
        known.least_squares_loss, known.sharpness = line.loss, line.sharpness
        known.largest_stable_learning_rate = line.largest_stable_learning_rate
        weights = torch.cat([each.flatten(1) for each in members.optimizer.frozen[: members.num_trained]], dim=1)
        excess = [line.excess(each) for each in weights.cpu()]
        first_excess = line.excess(parameters_to_vector(members.member.parameters()))
    steps, stopped = members.optimizer.num_steps.tolist(), members.stopped_at.tolist()
    metrics = {}
    for tag, curve in members.curves.items():
        if tag.endswith("/loss"):  # each one's last
            metrics[tag] = reduce(lambda last, new: new.where(~new.isnan(), last), [each for _, each in curve]).tolist()
    results = []
    for index, job in enumerate(group.jobs.values()):
        settings = members.recipe.param_groups[index]
        result = replace(known, overrides=job, num_optimizer_steps=steps[index])
        result.status = "completed" if stopped[index] < 0 else "diverged"
        result.verdict = None if stopped[index] < 0 else "diverging"
        left = result.excess_loss = excess[index] if excess else None
        if left is not None and first_excess is not None and left <= Thresholds.tolerance * first_excess:
            result.verdict = "converged"  # the one word that the closed form alone decides
        result.learning_rate = float(settings.get("initial_lr", settings["lr"]))
        result.metrics = {tag: values[index] for tag, values in metrics.items()}
        result.objective = result.metrics.get(result.monitor or "")
        result.evidence = {"trained_at_once": len(group.jobs)}
        results.append(result)
    return results


def _curves(fit: Fit) -> Iterator[bytes]:
    """The event file of each member: what was measured, until it stopped."""
    now = time.time()
    begin = encoded(
        [Event(wall_time=now, file_version="brain.Event:2"), Event(wall_time=now, summary=custom_scalars(LAYOUT))]
    )
    points: dict[int, dict[str, list[float]]] = defaultdict(dict)
    for tag, curve in fit.members.curves.items():
        for step, measured in curve:
            points[step][tag] = measured.tolist()
    for index, end in enumerate(fit.members.stopped_at.tolist()):
        mine: dict[int, dict[str, float]] = defaultdict(dict)
        for step in sorted(points):
            for tag, values in points[step].items():
                if end < 0 or step < end:
                    mine[step][tag] = values[index]
                elif "/loss" in tag:
                    mine[end].setdefault(tag, values[index])  # it was validated once more, when it had stopped
        yield begin + encoded_scalars({step: with_logarithms(values) for step, values in mine.items()}, now)


def _checkpoints(fit: Fit, index: int, result: Result) -> dict[str, bytes]:
    """The newest weights, from which the run continues, and the best ones."""
    members, whole = fit.members, fit.checkpoint
    assert whole
    common = {key: value for key, value in whole.items() if key not in RUN_KEYS}
    last = common | {name: whole[name] for name in ("epoch", "global_step")}
    last["state_dict"] = members.state_of(index, members.optimizer.frozen)
    if result.status == "completed":
        mine = whole["progress"]["processes"][0]
        told = {**members.recipe.defaults, **members.settings[index]}
        settings = {name: value for name, value in told.items() if isinstance(value, int | float | tuple)}
        schedulers = [each.scheduler for each in members.schedulers]
        last["progress"] = whole["progress"] | {
            "processes": [mine | {"metrics": {}, "sums": {}}],  # an epoch has ended: nothing is added up yet
            "seconds": result.seconds,
            "model": name_of(members.member),
            "metrics": result.metrics,
            "optimizers": [name_of(members.recipe)],
            "schedulers": [name_of(each) for each in schedulers],
            "settings": [settings],
        }
        last["optimizer_states"] = [members.optimizer_of(index)]
        last["lr_schedulers"] = [of_member(each.state_dict(), index) for each in schedulers]
        last["loops"] = whole["loops"]
        last["callbacks"] = {name: {"best": float(members.best[index])} for name in whole["callbacks"]}
    files = {LAST: as_bytes(last)}
    if torch.isfinite(members.best[index]):
        place = {"epoch": int(members.best_epochs[index]), "global_step": int(members.best_steps[index])}
        if members.stopped_at[index] >= 0:
            place["global_step"] = min(place["global_step"], int(members.stopped_at[index]))
        files[BEST] = as_bytes(common | place | {"state_dict": members.state_of(index, members.best_weights)})
    return files


RUN_KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "progress", "epoch", "global_step")
