"""Training: compose → build → fit → result."""

import contextlib
import logging
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, LambdaCallback, ProgressBar
from omegaconf import DictConfig, OmegaConf

from downslope.callbacks import FlightRecorder, VerdictMonitor
from downslope.gradients.least_squares import HasLeastSquares
from downslope.logs.forgiving import forgiving
from downslope.logs.hparams import write_hparams
from downslope.logs.tensorboard import close_step_writer, rewind_event_files, write_scalars, write_text
from downslope.runs.console import explain, print_header, print_interrupted, print_result
from downslope.runs.result import Result
from downslope.runs.resuming import checkpoint_of
from downslope.runs.signals import Interrupted
from template.regression.data import DataModule
from template.regression.evaluation import evaluate, evaluate_parts

log = logging.getLogger(__name__)
for name in ("lightning", "lightning.pytorch", "lightning.fabric"):  # they print for themselves, unless told otherwise
    logging.getLogger(name).handlers.clear()
    logging.getLogger(name).propagate = True

DIVERGED_BEYOND = 1e6


def check_device(config: DictConfig) -> None:
    """Refuses a device that is not there.

    Raises:
        ValueError: What was asked for, what is there, and the way out.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    asked = config.trainer.accelerator
    there = available.get(asked, True) if asked != "gpu" else available["cuda"] or available["mps"]
    if not there:
        names = ", ".join(name for name, present in available.items() if present)
        raise ValueError(
            f"`device={asked}` must be a device that PyTorch {torch.__version__} finds on this machine ({names}), "
            f"got none: device=auto takes the best there is."
        )


def check_processes(config: DictConfig) -> None:
    """Refuses several processes on the CPU that nobody asked for: Lightning would start them in silence.

    Raises:
        ValueError: The number that was asked for, and the way out.
    """
    devices, strategy = config.trainer.get("devices", 1), config.trainer.get("strategy", "auto")
    on_cpu = config.trainer.accelerator == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and strategy == "auto" and isinstance(devices, int) and devices > 1:
        raise ValueError(
            f"`trainer.devices` must be 1 on the CPU, got {devices}. Several processes that share each batch: "
            f"trainer=ddp trainer.devices={devices}."
        )


def build(config: DictConfig) -> tuple[DataModule, LightningModule, Trainer]:
    """Makes what trains out of its configuration: reads the data, writes nothing.

    Raises:
        ValueError: A part of it cannot be.
    """
    check_device(config)
    check_processes(config)
    datamodule = instantiate(config.data, _convert_="all")
    seed_everything(config.seed, workers=True, verbose=False)
    module = instantiate(config.model, num_features=datamodule.num_features, _convert_="all")
    try:
        module.configure_optimizers()
    except (TypeError, ValueError) as error:
        prefix = "" if "`" in str(error) else "`optimizer` or `scheduler`: "
        raise ValueError(f"{prefix}{error}") from error
    callbacks = [instantiate(node) for node in config.callbacks.values()]
    if config.trainer.get("enable_checkpointing") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
    if config.trainer.get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    loggers = [forgiving(instantiate(node)) for node in config.logger.values()]
    # Where nobody keeps checkpoints, Lightning would, in the folder that one happens to stand in.
    keeps = config.trainer.get("enable_checkpointing", any(isinstance(each, Checkpoint) for each in callbacks))
    parts = {"logger": loggers, "callbacks": callbacks, "enable_checkpointing": keeps}
    trainer = instantiate(config.trainer, **parts, _convert_="all")
    if not module.automatic_optimization:
        _check_manual(trainer)
    return datamodule, module, trainer


def _check_manual(trainer: Trainer) -> None:
    """Refuses what Lightning does for automatic optimization alone."""
    if trainer.gradient_clip_val is not None:
        raise ValueError(
            "Cannot set `trainer.gradient_clip_val` with `model=manual`. This is because the cycle that is written "
            f"out clips for itself: use model.gradient_clip_val={trainer.gradient_clip_val}."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "Cannot set `trainer.accumulate_grad_batches` with `model=manual`. This is because the cycle that is "
            "written out steps after every batch: use a larger data.batch_size, or model=automatic."
        )


def train(config: DictConfig) -> float:
    """Trains as configured, and leaves the run's folder as README describes it.

    Returns:
        The validation loss of the last weights: what a sweeper minimises.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    logging.captureWarnings(True)
    result = Result(
        status="failed",
        learning_rate=config.lr,
        overrides=list(hydra.overrides.task),
        seed=config.seed,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("downslope", "torch", "lightning", "hydra-core", "numpy")},
        },
    )
    try:
        datamodule, module, trainer = build(config)
        if trainer.is_global_zero:
            print_header(config, datamodule, trainer)
        checkpoint = None
        if config.get("resume"):
            checkpoint, state = checkpoint_of(folder, datamodule, module)
            result.seconds = state["progress"]["seconds"]
            if trainer.is_global_zero:
                rewind_event_files(folder, state["progress"]["event_files"])
        write_text(trainer, "configuration", OmegaConf.to_yaml(config))
        _fit(result, datamodule, module, trainer, checkpoint)
    except Exception as error:
        result.error = {"type": type(error).__name__, "message": explain(error)}
        log.info("failed", exc_info=True)
        with contextlib.suppress(OSError):  # a disk that is full must not hide the error
            result.write(folder)
        raise
    except Interrupted as stop:
        result.status = "interrupted"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            result.write(folder)
            print_interrupted(result, folder, stop.saved)
        raise
    if trainer.is_global_zero:
        try:
            result.write(folder)
            write_hparams(folder, config, hydra.runtime.choices, result)
        finally:  # where the file cannot be written, the terminal is all there is
            print_result(result, folder)
    return result.metrics["val/loss"]


def _fit(
    result: Result, datamodule: DataModule, module: LightningModule, trainer: Trainer, checkpoint: Path | None = None
) -> None:
    """Trains, and fills in what came of it."""
    datamodule.setup("fit")
    line = datamodule.least_squares
    result.least_squares_loss = line.loss
    result.device = str(trainer.strategy.root_device)
    first_loss = evaluate(module, *datamodule.parts["train"])["loss"]

    def on_fit_start(trainer: Trainer, module: LightningModule) -> None:
        own = module.least_squares() if isinstance(module, HasLeastSquares) else None
        if own is not None:  # a network's curvature is not that of the line through its data
            result.sharpness = own.sharpness
            result.largest_stable_learning_rate = own.largest_stable_learning_rate

    def on_train_end(trainer: Trainer, module: LightningModule) -> None:
        result.metrics = evaluate_parts(module, datamodule.parts)
        test = {tag: value for tag, value in result.metrics.items() if tag.startswith("test/")}
        write_scalars(trainer, test, trainer.global_step)

    # The loggers close before fit returns. Lightning does not declare the attribute.
    trainer.callbacks.append(LambdaCallback(on_fit_start=on_fit_start, on_train_end=on_train_end))  # type: ignore[attr-defined]
    started = time.perf_counter()
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    finally:
        result.seconds += time.perf_counter() - started
        result.num_optimizer_steps = trainer.global_step
    if not result.metrics:  # killed after its last checkpoint: nothing was left to train
        on_train_end(trainer, module)
        close_step_writer(trainer)
        for logger in trainer.loggers:
            logger.finalize("success")
    loss = result.metrics["train/loss"]
    result.excess_loss = loss - line.loss
    result.status = "completed" if loss <= DIVERGED_BEYOND * first_loss else "diverged"  # NaN is no ≤ either
    for observer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(observer, VerdictMonitor) and observer.verdict:
            _tell_verdict(result, observer)
    for recorder in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(recorder, FlightRecorder) and recorder.diverged:
            _tell_divergence(result, recorder)
    if result.status == "diverged" and result.verdict not in ("diverging", "too_large", "non_finite"):
        result.verdict = "diverging"  # between two judgements


def _tell_verdict(result: Result, monitor: VerdictMonitor) -> None:
    """Fills in the verdict, in words and figures."""
    verdict = monitor.verdict
    assert verdict
    result.verdict = verdict.word
    result.suggested_learning_rate = verdict.suggestion.learning_rate
    result.evidence |= {
        "sentence": verdict.sentence,
        "suggestion": verdict.suggestion.reason,
        "hints": list(verdict.hints),
        "first_diverging_step": monitor.first_diverging_step,
        **verdict.figures,
    }


def _tell_divergence(result: Result, recorder: FlightRecorder) -> None:
    """Fills in what the recorder saw: the metrics are already those of the weights before the offending step."""
    result.status = "diverged"
    if record := recorder.flight_record:
        result.evidence["diverged"] = record.sentence()
        if record.restored_to_step is not None:
            result.num_optimizer_steps = record.restored_to_step
