"""A job in a process of its own: what several processes train together must be able to die without the sweep."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from downslope.runs.configuration import own_folders
from downslope.runs.console import FULL_ERROR, SHOW_TRACEBACK
from downslope.runs.result import read_result
from downslope.sweeps.job import objective


def distributed(config: DictConfig) -> bool:
    """Tells whether Lightning would start the job's other processes by the command line, here the whole sweep's."""
    return bool(config.trainer.get("strategy", "auto") != "auto")


def train_in_process(config: DictConfig) -> float:
    """Trains by a command that says this job alone: Lightning starts the other ranks by the same one.

    Raises:
        ValueError: It failed; what it said for itself, or which signal it died of.
        SystemExit: This process was told to stop, and the job has stopped first.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    command = [sys.executable, sys.argv[0], *_arguments(config, folder)]
    environment = {**os.environ, FULL_ERROR: str(int(SHOW_TRACEBACK))}  # without what this process has borrowed
    process = subprocess.Popen(command, cwd=hydra.runtime.cwd, env=environment)
    try:
        code = process.wait()
    except (SystemExit, KeyboardInterrupt) as stop:
        process.send_signal(signal.SIGTERM if getattr(stop, "code", 130) == 143 else signal.SIGINT)
        process.wait()
        raise
    result = read_result(folder)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise SystemExit(code)
    if result is None or result.status == "failed" or code < 0:
        died = f"one of the job's processes died (exit code {code}): see {folder.name}/train.log"
        raise ValueError(result.error["message"] if result and result.error else died)
    result.overrides = list(hydra.overrides.task)
    result.write(folder)
    return objective(result)


def _arguments(config: DictConfig, folder: Path) -> list[str]:
    choices = HydraConfig.get().runtime.choices
    resume = [f"resume='{config.resume}'"] if config.get("resume") else []
    return [
        *("--config-path", str(folder / ".hydra"), "--config-name", "config", "--config-dir", str(own_folders()[0])),
        *(f"++hydra.runtime.choices.{group}={choices[group]}" for group in ("model", "optimizer", "data", "device")),
        *("hydra/job_logging=downslope", "hydra/hydra_logging=none", "hydra.output_subdir=null"),
        f'hydra.run.dir="{folder}"',
        *resume,
    ]
