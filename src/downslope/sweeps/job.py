"""One job of a sweep: kept, resumed or run, once, in a folder of its own that no other process touches meanwhile."""

import contextlib
import difflib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from downslope.runs.command_line import typed
from downslope.runs.console import explain, one_line, say
from downslope.runs.folder import LOCK
from downslope.runs.plain_files import LOADER, check_regular, read_yaml
from downslope.runs.result import Result, objective_of, read_result
from downslope.runs.signals import STOP_FILE, leave_interrupts_to_the_sweep, signal_from_the_sweep

LONGEST_NAME = 100
ODD = re.compile(r"[^\w.,=+\-@~]+")
ENDED = ("completed", "diverged")
HOW_IT_IS_RUN = ("hydra", "resume", "resume_override", "trust")  # keys that do not say which job it is
KEY = ".hydra/key"  # a digest of what the job was composed from: grid.py
SOURCES = "DOWNSLOPE_SOURCES"  # how a sweep tells its jobs, wherever they run, what theirs is made of


def job_name(overrides: str) -> str:
    """Returns overrides as a folder's name; where they are long or odd, what is readable of them and a hash.

    Example:
        >>> job_name("device=cpu,lr=0.01")
        'device=cpu,lr=0.01'
        >>> job_name("data.path=tables/houses.csv")
        'data.path=tables-houses.csv@7dc9c5923e'
    """
    plain = ODD.sub("-", overrides)
    if plain == overrides and 0 < len(plain) <= LONGEST_NAME and plain.strip(".") and "@" not in plain:
        return plain
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:10]
    return f"{plain[: LONGEST_NAME - 11] or 'defaults'}@{digest}"


def job_key(sources: str, overrides: Sequence[str]) -> str:
    """Returns a digest of all that a job is composed from: where it is equal, so is the composed configuration."""
    return hashlib.sha256("\n".join([sources, *overrides]).encode()).hexdigest()


def run_job(config: DictConfig, train: Callable[[DictConfig], float]) -> float:
    """Runs a job of a sweep unless it has ended already, or runs in another process.

    Its error is told, written into its `result.json` and not raised: the other jobs run on.

    Args:
        config: As composed, without Hydra's own node.
        train: Trains as configured.

    Returns:
        The objective as logged, which a sweeper minimises or maximises; the worst there is where it has none.

    Raises:
        ValueError: The folder holds the same job with another configuration, or something that is no job.
    """
    folder, mode = Path(HydraConfig.get().runtime.output_dir), config.get("mode", "min")
    leave_interrupts_to_the_sweep()
    if signal_from_the_sweep():
        return objective_of(None, mode)
    check_regular(folder)
    try:
        with FileLock(folder / LOCK, blocking=False):
            check_identity(config, folder)
            result = result_of(folder)
            if result is None or result.status not in ENDED:
                prepare(config, folder, result)
                result = _run(config, folder, train)
            else:
                say(f"kept {folder.name}: {result.status}")
            return objective_of(result, mode)
    except Timeout:
        say(f"left {folder.name} to the process that runs it")
        return objective_of(None, mode)


def is_running(folder: Path) -> bool:
    """Tells whether a process has the job in hand."""
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except Timeout:
        return True


def result_of(folder: Path) -> Result | None:
    """Reads a job's result: one that cannot be read is a failed job's."""
    try:
        return read_result(folder)
    except (OSError, ValueError) as error:
        return failure(error)


def failure(error: Exception, **known: Any) -> Result:
    """Returns the result of a job that an error has ended."""
    return Result(status="failed", error={"type": type(error).__name__, "message": explain(error)}, **known)


def _run(config: DictConfig, folder: Path, train: Callable[[DictConfig], float]) -> Result | None:
    from downslope.sweeps.process import train_as_if_alone

    say(f"\n{folder.name}")
    try:
        train_as_if_alone(config, train)
    except SystemExit:  # told to stop, it has saved
        if STOP_FILE not in os.environ:
            raise  # the sweep runs in this process
    except Exception as error:
        result = result_of(folder)
        if result is None or result.status != "failed":
            overrides = typed(HydraConfig.get().overrides.task)
            failure(error, learning_rate=config.get("lr"), overrides=overrides, seed=config.get("seed")).write(folder)
        say(f"  failed    {one_line(explain(error))}")
    return result_of(folder)


def check_identity(config: DictConfig, folder: Path) -> None:
    """Refuses a folder whose job had the same overrides over another configuration.

    Raises:
        ValueError: The lines that differ, and the way out.
    """
    before = read_yaml(folder / ".hydra" / "config.yaml")
    if before is None:
        return
    old, new = _identity(before), _identity(yaml.load(OmegaConf.to_yaml(config), LOADER))
    if old != new:
        _, _, *changes = difflib.unified_diff(old, new, n=0, lineterm="")
        raise ValueError(
            f"`hydra.sweep.dir` holds {folder.name} with a different configuration (− there, + now):\n  "
            + "\n  ".join(line for line in changes if not line.startswith("@@"))
            + "\nLeave out hydra.sweep.dir to start a new sweep, or undo the change."
        )


def _identity(config: Any) -> list[str]:
    """What makes a job the one it is, its composed configuration, in lines."""
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key not in HOW_IT_IS_RUN}
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)).splitlines()


def prepare(config: DictConfig, folder: Path, result: Result | None) -> None:
    """Makes the folder ready: to be resumed where a job was stopped, else empty; and writes the job's identity there.

    Raises:
        ValueError: It holds files and is no job's: they are not ours to delete.
    """
    stopped = result is None or result.status == "interrupted"
    if stopped and _has_checkpoint(folder):
        config.resume = str(folder)
        return
    target, partial, hydra = folder / ".hydra", folder / ".hydra.partial", HydraConfig.get()
    leftovers = [each for each in folder.iterdir() if each.name != LOCK]
    if not target.is_dir() and (others := [each for each in leftovers if each != partial and each.suffix != ".log"]):
        raise ValueError(
            f"`hydra.sweep.dir` must be a folder that is used for nothing else, got {folder}, "
            f"which holds {others[0].name}."
        )
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    partial.mkdir()
    overrides = typed(hydra.overrides.task)
    contents = {"config": config, "hydra": OmegaConf.create({"hydra": hydra}), "overrides": OmegaConf.create(overrides)}
    for name, content in contents.items():
        OmegaConf.save(content, partial / f"{name}.yaml")
    if sources := hydra.job.env_set.get(SOURCES):
        (partial / Path(KEY).name).write_text(job_key(sources, overrides))
    partial.replace(target)


def begun(folder: Path) -> bool:
    """Tells whether a job has ended, or has something to be resumed from."""
    result = result_of(folder)
    stopped = result is None or result.status == "interrupted"
    return _has_checkpoint(folder) if stopped else bool(result and result.status in ENDED)


def _has_checkpoint(folder: Path) -> bool:
    from downslope.runs.checkpoints import newest_checkpoint

    with contextlib.suppress(ValueError):
        return bool(newest_checkpoint(folder))
    return False
