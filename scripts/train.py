"""Trains, once or in a sweep; `--help` shows what can be chosen. What happens is in src/template/train.py."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from downslope.launch.command import command, run


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """Trains as configured."""
    objective: float | None = run(config, "template.train.train")
    return objective


if __name__ == "__main__":
    command(main, Path(__file__).parents[1] / "conf")
