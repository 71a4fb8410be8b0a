"""A job as if alone: this process is put back after it, and one that has several processes has them to itself."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from downslope.runs.command_line import command_line, typed
from downslope.runs.console import FULL_ERROR, SHOW_TRACEBACK
from downslope.runs.result import objective_of, read_result
from downslope.steps.random_state import random_state

TORCH_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.is_grad_enabled, torch.set_grad_enabled),
)


def train_as_if_alone(config: DictConfig, train: Callable[[DictConfig], float]) -> float:
    """Trains in this process, or in several of their own, which must be able to die without the sweep.

    Lightning starts a job's other processes by the command line, which here is the whole sweep's. Relative paths are
    those of whoever typed them, also with `hydra.job.chdir`.
    """
    if OmegaConf.select(config, "trainer.strategy", default="auto") != "auto":
        return train_in_processes(config)
    with isolated():
        os.chdir(HydraConfig.get().runtime.cwd)
        return train(config)


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Puts back what a job may have changed for the whole process: the next finds it as the first one did."""
    environment, folder = dict(os.environ), Path.cwd()
    before = [(restore, read()) for read, restore in TORCH_SETTINGS]
    benchmark = torch.backends.cudnn.benchmark
    try:
        with random_state(), warnings.catch_warnings():
            try:
                yield
            finally:
                logging.captureWarnings(False)  # or logging believes that it still does, and the next job's show
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for restore, value in before:
            restore(value)
        torch.backends.cudnn.benchmark = benchmark


def train_in_processes(config: DictConfig) -> float:
    """Trains by a command that says this job alone: Lightning starts the other ranks by the same one.

    Raises:
        ValueError: It failed; what it said for itself, or which signal it died of.
        SystemExit: This process was told to stop, and the job has stopped first.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    environment = {**os.environ, FULL_ERROR: str(int(SHOW_TRACEBACK))}  # without what this process has borrowed
    with _handed_over(config) as file:
        flags = ["--config-path", str(file.parent), "--config-name", file.stem]
        process = subprocess.Popen([*_script(), *flags], cwd=hydra.runtime.cwd, env=environment)
        try:
            code = process.wait()
        except (SystemExit, KeyboardInterrupt) as stop:
            process.send_signal(signal.SIGTERM if getattr(stop, "code", 130) == 143 else signal.SIGINT)
            process.wait()
            raise
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise SystemExit(code)
    result = read_result(folder)
    if result is None or result.status == "failed" or code < 0:
        died = f"one of the job's processes died (exit code {code}): see {folder.name}/{hydra.job.name}.log"
        raise ValueError(result.error["message"] if result and result.error else died)
    result.overrides = typed(hydra.overrides.task)
    result.write(folder)
    return objective_of(result, result.mode)


def _script() -> list[str]:
    """The command that this process, or its sweep, was started by, less its arguments."""
    _, *rest = command_line()
    return [sys.executable, *rest[: 2 if rest[0] == "-m" else 1]]


@contextlib.contextmanager
def _handed_over(config: DictConfig) -> Iterator[Path]:
    """Writes what this process has composed, and checked, to where nobody else can read or write.

    The run's folder may be a stranger's: nothing of it says what the other processes do. Nor do they compose anything.
    """
    hydra = HydraConfig.get()
    own = {
        "run": {"dir": hydra.runtime.output_dir},
        "output_subdir": None,
        "job": {"name": hydra.job.name},
        "runtime": {"choices": hydra.runtime.choices},
        "job_logging": hydra.job_logging,
    }
    defaults = [{f"override hydra/{name}": "none"} for name in ("job_logging", "hydra_logging")]
    with tempfile.TemporaryDirectory(prefix="job-") as private:
        file = Path(private) / "job.yaml"
        file.touch(mode=0o600)
        OmegaConf.save(OmegaConf.merge({"defaults": [*defaults, "_self_"], "hydra": own}, config), file)
        yield file
