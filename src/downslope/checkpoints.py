"""A run's checkpoints: plain tensors and plain data, read as nothing else."""

import pickle
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import LightningModule
from omegaconf import DictConfig, OmegaConf

BEST = "checkpoints/best.ckpt"
LAST = "checkpoints/last.ckpt"


def read_configuration(run: Path) -> DictConfig:
    """Reads the configuration that a run was made with.

    Raises:
        ValueError: The folder is not a run's.
    """
    file = run / ".hydra" / "config.yaml"
    if not file.is_file():
        raise ValueError(f"`run` must be the folder of a run, outputs/runs/…, got {str(run)!r}: it has no {file.name}.")
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    return config


def read_checkpoint(run: Path, name: str = BEST) -> dict[str, Any]:
    """Reads a checkpoint as data: nothing in it is executed.

    Raises:
        ValueError: There is none, or it is not one.
    """
    file = run / name
    if not file.is_file():
        raise ValueError(f"`run` must be a run that has saved a checkpoint, got {str(run)!r}: it has no {name}.")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} cannot be read as a checkpoint: {reason}") from error
    assert isinstance(checkpoint, dict)
    return checkpoint


def load_module(config: DictConfig, checkpoint: dict[str, Any], num_features: int) -> LightningModule:
    """Makes a run's model, with the weights of a checkpoint."""
    module: LightningModule = instantiate(config.model, num_features=num_features, _convert_="all")
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()
