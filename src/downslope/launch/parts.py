"""The parts of a run: checked while they are made, and made once."""

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import ReduceLROnPlateau

from downslope.launch.quick_steps import quicken
from downslope.runs.configuration import has_target, show
from downslope.runs.prepared import take

Parts = TypeVar("Parts")


def prepared(config: DictConfig, build: Callable[[DictConfig], Parts]) -> Parts:
    """Returns the parts that were built before the run's folder was, or builds them: a sweep's job has none yet."""
    return take("parts", lambda: build(config))


def check_optimizer(config: DictConfig) -> None:
    """Raises for settings that the optimizer or its scheduler refuses, by making them for a parameter of their own."""
    argument: Any = [torch.nn.Parameter(torch.zeros(1))]
    for key in ("optimizer", "scheduler.scheduler"):
        node = OmegaConf.select(config, key)
        if not (isinstance(node, DictConfig) and node.get("_partial_")):
            return
        make = instantiate(node, _convert_="all")
        length = inspect.signature(make).parameters.get("num_steps")
        needs_end = length is not None and length.default is length.empty
        if needs_end and (config.trainer.get("max_epochs"), config.trainer.get("max_steps", -1)) == (-1, -1):
            raise ValueError(
                f"`{key}` must know where the run ends: set `trainer.max_epochs` or `trainer.max_steps`, "
                "got -1 for both."
            )
        try:
            argument = make(argument, **({"num_steps": 1000} if needs_end else {}))
        except (TypeError, ValueError) as error:
            raise ValueError(str(error) if "`" in str(error) else f"`{key}`: {error}") from error
    if isinstance(argument, ReduceLROnPlateau):
        _check_validation(config)
    else:
        _check_finder(config)


def _check_finder(config: DictConfig) -> None:
    """Raises where the rate that Lightning's finder sets would be forgotten: a schedule starts from its own."""
    for name, node in config.get("callbacks", {}).items():
        if has_target(node) and str(node["_target_"]).endswith(".LearningRateFinder"):
            raise ValueError(
                f"Cannot combine `callbacks.{name}` with `scheduler={_chosen('scheduler')}`. This is because a "
                "schedule returns to the rate it was made with: find a rate with scheduler=constant, then set lr to it."
            )


def _check_validation(config: DictConfig) -> None:
    """Raises for a Trainer that never validates, or not once an epoch, where a plateau of that metric is waited for."""
    for key, allowed in {
        "limit_val_batches": "greater than 0",
        "check_val_every_n_epoch": "a number of epochs",
    }.items():
        value = config.trainer.get(key, 1)
        if value is None or not value > 0:
            raise ValueError(
                f"`trainer.{key}` must be {allowed} with this schedule, got {show(value)}. "
                f"This is because it looks at `{config.scheduler.monitor}` after each validation."
            )


def check_device(config: DictConfig) -> None:
    """Raises for a device that is not there, and for several processes on the CPU that nobody asked for."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    has_gpu = available["cuda"] or available["mps"]
    asked = config.trainer.get("accelerator", "auto")
    if not (has_gpu if asked == "gpu" else available.get(asked, True)):
        names = ", ".join(name for name, present in available.items() if present)
        raise ValueError(
            f"`device={asked}` must be a device that PyTorch {torch.__version__} finds on this machine ({names}), "
            f"got none: device=auto uses the best one available."
        )
    devices, strategy = config.trainer.get("devices", 1), config.trainer.get("strategy", "auto")
    on_cpu = asked == "cpu" or not has_gpu
    if on_cpu and strategy == "auto" and isinstance(devices, int) and devices > 1:  # Lightning would, in silence
        raise ValueError(
            f"`trainer.devices` must be 1 on the CPU, got {devices}. To share each batch among processes: "
            f"trainer=ddp trainer.devices={devices}."
        )


def make_module(config: DictConfig, data: Any) -> LightningModule:
    """Makes the module: of its constructor's arguments, those that `config.model` leaves out come from the data.

    Raises:
        ValueError: Nobody gives an argument that the module must have; or the data refuse to be read.
    """
    module: LightningModule = instantiate(config.model, **_from_data(config, data), _convert_="all")
    return module


def _from_data(config: DictConfig, data: Any) -> dict[str, Any]:
    target = get_object(config.model["_target_"])
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name in config.model or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if hasattr(type(data), name) or name in vars(data):
            try:
                given[name] = getattr(data, name)
            except ValueError as error:  # the data are read here: their message names their own arguments
                raise ValueError(re.sub(r"^`(\w+)`", r"`data.\1`", str(error))) from error
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"`model.{name}` must be given: {target.__name__} needs it, and {type(data).__name__} has no attribute "
                f"of that name. Write it into the file in conf/model/, or type +model.{name}=…; or choose `model=` "
                f"and `data=` of one task (got data={_chosen('data')}, model={_chosen('model')})."
            )
    return given


def _chosen(group: str) -> str | None:
    """Which option of a group was composed."""
    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None


def make_trainer(config: DictConfig, module: LightningModule, loggers: list[Logger]) -> Trainer:
    """Makes the Trainer with the callbacks of the configuration, less those that `trainer` turns off.

    Where nobody keeps checkpoints, Lightning's own would be in the folder that one happens to stand in.

    Raises:
        ValueError: It cannot train this module.
    """
    callbacks = [instantiate(node) for node in config.callbacks.values()]
    for key, kind in (("enable_checkpointing", Checkpoint), ("enable_progress_bar", ProgressBar)):
        if config.trainer.get(key) is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]
    keeps = config.trainer.get("enable_checkpointing", any(isinstance(each, Checkpoint) for each in callbacks))
    parts = {"callbacks": callbacks, "logger": loggers, "enable_checkpointing": keeps}
    if HydraConfig.initialized() and "default_root_dir" not in config.trainer:
        parts["default_root_dir"] = HydraConfig.get().runtime.output_dir  # not the folder one happens to stand in
    trainer: Trainer = instantiate(config.trainer, **parts, _convert_="all")
    _check_manual_optimization(config, module, trainer)
    quicken(trainer, module)
    return trainer


def _check_manual_optimization(config: DictConfig, module: LightningModule, trainer: Trainer) -> None:
    """Raises for what Lightning does for automatic optimization alone."""
    if module.automatic_optimization:
        return
    reason = f"This is because the training_step of {type(module).__name__} takes its optimizer steps itself"
    if trainer.gradient_clip_val is not None:
        own = f"model.gradient_clip_val={trainer.gradient_clip_val}" if "gradient_clip_val" in config.model else ""
        raise ValueError(
            f"Cannot set `trainer.gradient_clip_val` with manual optimization. {reason}, and must clip for itself: use "
            f"{own or 'self.clip_gradients there'}."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"Cannot set `trainer.accumulate_grad_batches` with manual optimization. {reason}: use larger batches, or "
            "a model with automatic optimization."
        )
