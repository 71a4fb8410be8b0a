"""A run's folder is of one run, and one process at a time works on it."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # the system lets go of it when its process dies, by kill -9 too
TRACES = (".hydra", "checkpoints", "result.json")  # of a run
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # as Lightning reads them


def is_main_process() -> bool:
    """Tells whether this is the one of a run's processes that writes; torch need not be there to ask."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def check_unused(folder: Path) -> None:
    """Refuses a folder in which a run has been: what is in it would belong to neither.

    Raises:
        ValueError: The folder, and both ways out.
    """
    if any((folder / name).exists() for name in TRACES):
        raise ValueError(
            f"`hydra.run.dir` must be a folder that holds no run yet, got {str(folder)!r}. "
            f"To resume that run: resume={folder}. For a new run: choose another hydra.run.dir, or leave it out."
        )


def lock(folder: Path) -> FileLock:
    """Keeps every other process away from a folder, which is made where it is missing.

    Raises:
        ValueError: One works on it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / LOCK)
        held.acquire(blocking=False)
        return held
    except Timeout:
        raise ValueError(
            f"Another process is working on {str(folder)!r}. Wait until it ends, or stop it with Ctrl-C there, "
            "which saves; then run the same command again."
        ) from None
