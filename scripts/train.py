"""Trains a linear regression, once or in a sweep; `--help` shows what can be chosen."""

import os

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from downslope.launch.gate import Gate
from downslope.runs.console import FULL_ERROR, SHOW_TRACEBACK, command, refusing
from downslope.sweeps.job import run_job


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> float:
    """Trains as configured."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_job(config, train)
    os.environ[FULL_ERROR] = str(int(SHOW_TRACEBACK))  # what was borrowed: other processes, of DDP say, inherit it
    with refusing("train"):
        return train(config)


def train(config: DictConfig) -> float:
    """Imports torch only here, so that `--help` answers at once."""
    from template.train import train

    return train(config)


if __name__ == "__main__":
    try:
        command(main, "train")
    except (SystemExit, KeyboardInterrupt) as stop:
        code = stop.code if isinstance(stop, SystemExit) else 130
        sweep, Gate.sweep = Gate.sweep, None
        if sweep and code in (130, 143):
            sweep.interrupted()
        elif sweep:  # the launcher or the sweeper gave up: Hydra has left without `on_multirun_end`
            sweep.finish()
        agreed = code == 3 or getattr(stop, "saved", None) is not None  # all processes stop, together
        if agreed and os.environ.get("LOCAL_RANK", "0") != "0":
            code = 0  # the main process tells it; Lightning kills that one, in mid-sentence, when another one fails
        raise SystemExit(code) from None
