"""The training command, run once or as a job of a sweep."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig

from downslope.launch.gate import Gate
from downslope.runs import console
from downslope.runs.folder import is_main_process
from downslope.runs.signals import end_on_signals
from downslope.sweeps.job import run_job


def run(config: DictConfig, train: str) -> Any:
    """Runs the training function of this full name: torch is imported only then, so that `--help` answers at once."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_job(config, lambda config: get_method(train)(config))
    os.environ[console.FULL_ERROR] = str(int(console.SHOW_TRACEBACK))  # what was borrowed: other processes inherit it
    with console.refusing("train"):
        return get_method(train)(config)


def command(main: Callable[[], Any], folder: Path, config_name: str = "train") -> None:
    """Runs what `hydra.main` made of a script's main function, and leaves with the exit code that tells how it ended.

    Args:
        main: Calls `run`.
        folder: Of the configuration.
        config_name: The primary one.
    """
    try:
        console.command(main, config_name, folder)
    except (SystemExit, KeyboardInterrupt) as stop:
        code = stop.code if isinstance(stop, SystemExit) else 130
        sweep, Gate.sweep = Gate.sweep, None
        if sweep and code in (130, 143):
            sweep.interrupted()
        elif sweep:  # the launcher or the sweeper gave up: Hydra has left without `on_multirun_end`
            sweep.finish()
        agreed = code == 3 or getattr(stop, "saved", None) is not None  # all processes stop, together
        if agreed and not is_main_process():
            code = 0  # the main process tells it; Lightning kills that one, in mid-sentence, when another one fails
        raise SystemExit(code) from None
    finally:
        Gate.let_go()
        end_on_signals()
