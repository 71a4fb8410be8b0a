"""What a run's best checkpoint predicts."""

from typing import Any

from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import DictConfig

from downslope.launch.parts import make_module
from downslope.runs.stored import StoredRun, columns, required_passes


def predict(config: DictConfig) -> dict[str, list[Any]]:
    """Returns a column of values by name: those of the dictionary that `predict_step` returns, or `prediction`.

    Args:
        config: `run` is the run's folder; what stands under `data` replaces the run's own, `data.path` say.

    Raises:
        ValueError: The run cannot be read, or its module or its data do not predict.
    """
    stored = StoredRun(config)
    data = instantiate(stored.config.data, _convert_="all")
    stored.load(data)  # before the module is made: columns and units are the run's
    module = make_module(stored.config, data)
    stored.load(module)
    trainer: Trainer = instantiate(stored.config.trainer, logger=False, _convert_="all")
    (prediction,) = required_passes(data, module, trainer, "predict")
    return columns(prediction(module, datamodule=data) or [])
