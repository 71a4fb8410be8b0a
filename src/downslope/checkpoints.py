"""A run's checkpoints: plain tensors and plain data, read as nothing else."""

import contextlib
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import LightningModule
from omegaconf import DictConfig

from downslope.trust import read_untrusted

BEST = "checkpoints/best.ckpt"
LAST = "checkpoints/last.ckpt"


def read_configuration(run: Path, trusted: Sequence[str] = ()) -> DictConfig:
    """Reads the configuration that a run was made with, as data: the run may be a stranger's.

    Args:
        run: The run's folder.
        trusted: What it may name beside what `downslope.trust` allows.

    Raises:
        ValueError: The folder is not a run's, or its configuration names what is not trusted.
    """
    file = run / ".hydra" / "config.yaml"
    if not file.is_file():
        raise ValueError(f"`run` must be the folder of a run, outputs/runs/…, got {str(run)!r}: it has no {file.name}.")
    return read_untrusted(file, trusted)


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
    except Exception as error:  # bytes that somebody has spoiled fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than plain tensors and plain data, and is not read any further."
        raise ValueError(f"{file} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file} cannot be read as a checkpoint: it holds a {type(checkpoint).__name__}.")
    return checkpoint


@contextlib.contextmanager
def belonging(run: Path, name: str = BEST) -> Iterator[None]:
    """Explains what fails because configuration and checkpoint are not of one and the same run.

    Raises:
        ValueError: In place of whatever somebody else's values lead to.
    """
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{run / name} does not belong to the configuration of its run: {reason}") from error


def load_module(config: DictConfig, checkpoint: dict[str, Any], num_features: int) -> LightningModule:
    """Makes a run's model, with the weights of a checkpoint."""
    module: LightningModule = instantiate(config.model, num_features=num_features, _convert_="all")
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()
