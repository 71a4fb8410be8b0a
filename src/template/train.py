"""Training, from top to bottom: compose → build → fit → result. Nothing here knows what is trained."""

from typing import NamedTuple

from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from downslope.launch.parts import check_device, make_module, make_trainer, prepared
from downslope.logs.non_raising import non_raising_logger
from downslope.runs.run import Run


class Parts(NamedTuple):
    """What trains."""

    data: LightningDataModule
    module: LightningModule
    trainer: Trainer


def build(config: DictConfig) -> Parts:
    """Makes the parts out of their configuration; each is made once, before any file of the run is written.

    An argument of the module that `conf/model/` does not give, `num_features` say, is taken from the data's attribute
    of that name.

    Raises:
        ValueError: A part cannot be; the message names the key.
    """
    check_device(config)
    data = instantiate(config.data, _convert_="all")
    seed_everything(config.seed, workers=True, verbose=False)
    module = make_module(config, data)
    loggers = [non_raising_logger(instantiate(node)) for node in config.logger.values()]
    trainer = make_trainer(config, module, loggers)
    return Parts(data, module, trainer)


def train(config: DictConfig) -> float | None:
    """Trains as configured; the run's folder says how it ended, whatever happens.

    Returns:
        The metric that `monitor` names, of the last weights: what a sweep is about.
    """
    with Run(config) as run:
        data, module, trainer = prepared(config, build)
        run.begin(data, module, trainer)
        trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
        run.collect(trainer)
        if run.has_test:
            trainer.test(module, datamodule=data, verbose=False)
            run.collect(trainer)
    return run.result.objective
