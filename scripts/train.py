"""Trains a linear regression, once or in a sweep; `--help` shows what can be chosen."""

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from downslope.console import command, refusing


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> float:
    """Trains as configured; torch is imported only here, so that `--help` answers at once."""
    from downslope.training import train

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return train(config)  # one job's error is Hydra's to collect: the others go on
    with refusing("train"):
        return train(config)


if __name__ == "__main__":
    command(main, "train")
