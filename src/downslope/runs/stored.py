"""A run that has ended, to be looked at: its configuration as data, and the weights of its best checkpoint."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig

from downslope.runs.checkpoints import BEST, LAST, load_checkpoint
from downslope.runs.log import begin_log
from downslope.runs.plain_files import check_regular
from downslope.runs.trust import check_local, names_in, read_untrusted

log = logging.getLogger(__name__)

LOADERS = {"validation": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}
QUIET = {
    "device": {"accelerator": "auto", "devices": 1},
    "trainer": {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False},
}


def weights_of(run: Path) -> Path | None:
    """Returns the checkpoint that a run is evaluated with: the best; the last where no metric chose a best."""
    return next((run / name for name in (BEST, LAST) if (run / name).is_file()), None)


class StoredRun:
    """Reads a run's folder, which may be a stranger's: nothing in it is executed.

    Args:
        config: `run` is the folder, `trust` what its configuration may name beside what this command's does; what
            stands under `data` replaces the run's own.

    Attributes:
        config: The run's configuration, for looking alone: no callback, no logger, no bar, on the device that is here.
        checkpoint: The best one; the last where no metric chose a best.

    Raises:
        ValueError: The folder is not a run's, has no checkpoint, or names what is not trusted.
    """

    def __init__(self, config: DictConfig) -> None:
        begin_log()
        check_local(config.run, "run")
        run = Path(config.run)
        check_regular(run)
        file = run / ".hydra" / "config.yaml"
        if not file.is_file():
            raise ValueError(
                f"`run` must be the folder of a run, outputs/runs/…, got {str(run)!r}: it has no {file.name}."
            )
        self.file = weights_of(run)
        if self.file is None:
            raise ValueError(f"`run` must be a run that has saved a checkpoint, got {str(run)!r}: it has no {BEST}.")
        if self.file.name != Path(BEST).name:
            log.warning("%s has no best checkpoint, since no metric chose one: the last one is used.", run)
        stored = read_untrusted(file, [*config.trust, *names_in(config)])
        asked = {key: value for key, value in config.get("data", {}).items() if value is not None}
        stored.callbacks, stored.logger = {}, {}
        stored.trainer.pop("strategy", None)
        stored.merge_with(QUIET, {"data": asked})
        self.config = stored
        self.checkpoint = load_checkpoint(self.file)

    def load(self, *parts: LightningDataModule | LightningModule) -> None:
        """Gives the module its weights, and the data what they had kept for later.

        Raises:
            ValueError: The checkpoint is not one of this configuration.
        """
        try:
            for part in parts:
                if isinstance(part, LightningModule):
                    part.load_state_dict(self.checkpoint["state_dict"])
                elif state := self.checkpoint.get(type(part).__qualname__):
                    part.load_state_dict(state)
        except (AttributeError, LookupError, RuntimeError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{self.file} does not belong to the configuration of its run: {reason}") from error


def passes(
    data: LightningDataModule, module: LightningModule, trainer: Trainer, names: Iterable[str] = ("validation", "test")
) -> Iterator[Callable[..., Any]]:
    """Yields the Trainer's passes that the module and its data are made for: `validate`, `test`, `predict`."""
    made: dict[str, Callable[..., Any]] = {
        "validation": trainer.validate,
        "test": trainer.test,
        "predict": trainer.predict,
    }
    for name in names:
        served = any(is_overridden(LOADERS[name], each) for each in (data, module))
        if served and is_overridden(f"{name}_step", module):
            yield made[name]


def required_passes(
    data: LightningDataModule, module: LightningModule, trainer: Trainer, *names: str
) -> list[Callable[..., Any]]:
    """Returns those of the Trainer's passes that can be made.

    Raises:
        ValueError: None of them; the message says what each takes.
    """
    found = list(passes(data, module, trainer, names))
    if not found:
        needed = ", or ".join(f"`{name}_step` and `{LOADERS[name]}`" for name in names)
        got = f"{type(module).__name__} on {type(data).__name__}"
        raise ValueError(f"`run` must be of a model and of data that have {needed}: {got} do not.")
    return found


def columns(outputs: Iterable[Any]) -> dict[str, list[Any]]:
    """Returns what `predict_step` returned for all batches, as columns by name.

    Args:
        outputs: Of each batch a dictionary of columns, or one column, which is called `prediction`.

    Raises:
        ValueError: It is neither.

    Example:
        >>> columns([{"a": [1.0], "b": ["x"]}, {"a": [2.0], "b": ["y"]}])
        {'a': [1.0, 2.0], 'b': ['x', 'y']}
    """
    table: dict[str, list[Any]] = {}
    for output in outputs:
        named = output if isinstance(output, Mapping) else {"prediction": output}
        for name, values in named.items():
            values = values.tolist() if hasattr(values, "tolist") else values
            if not isinstance(values, list):
                raise ValueError(f"`predict_step` must return columns of values, got {type(values).__name__}.")
            table.setdefault(str(name), []).extend(values)
    return table
