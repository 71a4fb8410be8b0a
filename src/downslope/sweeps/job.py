"""One job of a sweep: kept, gone on with or run, once, in a folder that no other process touches meanwhile."""

import difflib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from downslope.runs.console import explain, say
from downslope.runs.result import Result, read_result
from downslope.runs.signals import STOP_FILE, leave_interrupts_to_the_sweep, signal_from_the_sweep

LOCK = ".lock"  # the system lets go of it when its process dies, by kill -9 too
ENDED = ("completed", "diverged")
OWN_KEYS = ("hydra", "resume", "resume_override", "trust")  # how a job is run, not which one it is
KEY = ".hydra/key"  # a digest of what the job was composed from: sweeps/missing.py
SOURCES = "DOWNSLOPE_SOURCES"  # how the gate tells the jobs, wherever they run, what theirs is made of


def run_job(config: DictConfig, train: Callable[[DictConfig], float]) -> float:
    """Runs a job of a sweep unless it has ended already, or runs in another process.

    Its error is told, written into its `result.json` and not raised: the other jobs run on.

    Args:
        config: As composed, without Hydra's own node.
        train: Trains as configured.

    Returns:
        The validation loss, what a sweeper minimises; infinity where there is none.

    Raises:
        ValueError: The folder holds the same job with another configuration.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    leave_interrupts_to_the_sweep()
    if signal_from_the_sweep():
        return math.inf
    try:
        with FileLock(folder / LOCK, blocking=False):
            check_identity(config, folder)
            result = read_result(folder)
            if result is None or result.status not in ENDED:
                prepare(config, folder, result)
                result = _run(config, folder, train)
            else:
                say(f"kept {folder.name}: {result.status}")
            return objective(result)
    except Timeout:
        say(f"left {folder.name} to the process that runs it")
        return math.inf


def is_running(folder: Path) -> bool:
    """Tells whether a process has the job in hand."""
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except Timeout:
        return True


def objective(result: Result | None) -> float:
    """Returns what a sweeper minimises: the validation loss, infinity where the job has not completed."""
    loss = result.metrics.get("val/loss") if result and result.status == "completed" else None
    return math.inf if loss is None else loss


def _run(config: DictConfig, folder: Path, train: Callable[[DictConfig], float]) -> Result | None:
    say(f"\n{folder.name}")
    try:
        train(config)
    except SystemExit:  # told to stop, it has saved
        if STOP_FILE not in os.environ:
            raise  # the sweep runs in this process
    except Exception as error:
        result = read_result(folder)
        if result is None or result.status != "failed":
            Result(
                status="failed",
                learning_rate=config.get("lr"),
                overrides=list(HydraConfig.get().overrides.task),
                seed=config.get("seed"),
                error={"type": type(error).__name__, "message": explain(error)},
            ).write(folder)
        say(f"  failed    {explain(error)}")
    return read_result(folder)


def identity(config: DictConfig) -> str:
    """Returns what makes a job the one it is: its composed configuration."""
    keys = [str(key) for key in config if key not in OWN_KEYS]
    return OmegaConf.to_yaml(OmegaConf.masked_copy(config, keys))


def check_identity(config: DictConfig, folder: Path) -> None:
    """Refuses a folder whose job had the same overrides over another configuration.

    Raises:
        ValueError: The lines that differ, and the way out.
    """
    file = folder / ".hydra" / "config.yaml"
    if not file.is_file():
        return
    before = OmegaConf.load(file)
    assert isinstance(before, DictConfig)
    old, new = identity(before).splitlines(), identity(config).splitlines()
    if old != new:
        changes = [
            line for line in difflib.unified_diff(old, new, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")
        ]
        raise ValueError(
            f"`hydra.sweep.dir` holds {folder.name} with another configuration (− there, + now):\n  "
            + "\n  ".join(changes)
            + "\nLeave hydra.sweep.dir out for a sweep of its own, or undo the change."
        )


def prepare(config: DictConfig, folder: Path, result: Result | None) -> None:
    """Makes the folder ready: to go on where a job was stopped, else empty; and writes the job's identity there."""
    stopped = result is None or result.status == "interrupted"
    if stopped and _has_whole_checkpoint(folder):
        config.resume = str(folder)
        return
    for leftover in folder.iterdir():
        if leftover.name == LOCK:
            continue
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    hydra = OmegaConf.create({"hydra": HydraConfig.get()})
    target, partial = folder / ".hydra", folder / ".hydra.partial"
    partial.mkdir()
    with open_dict(hydra):
        for name, content in {"config": config, "hydra": hydra, "overrides": HydraConfig.get().overrides.task}.items():
            OmegaConf.save(content, partial / f"{name}.yaml")
    if sources := HydraConfig.get().job.env_set.get(SOURCES):
        (partial / Path(KEY).name).write_text(job_key(sources, HydraConfig.get().overrides.task))
    partial.replace(target)


def _has_whole_checkpoint(folder: Path) -> bool:
    if not any((folder / "checkpoints").glob("*.ckpt")):
        return False
    from downslope.runs.checkpoints import newest_checkpoint

    try:
        return bool(newest_checkpoint(folder))
    except ValueError:
        return False


def job_key(sources: str, overrides: Sequence[str]) -> str:
    """Returns a digest of all that a job is composed from: where it is equal, so is the composed configuration."""
    return hashlib.sha256("\n".join([sources, *overrides]).encode()).hexdigest()
