"""A run from its beginning to its end: its folder says how it ended, whatever happens."""

import contextlib
import logging
import math
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from hydra.core.hydra_config import HydraConfig
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import DictConfig, OmegaConf
from torch.nn.utils import parameters_to_vector

from downslope.gradients.least_squares import HasLeastSquares, LeastSquares
from downslope.logs.hparams import write_hparams
from downslope.logs.tensorboard import close_loggers, rewind_event_files, write_text
from downslope.runs.checkpoints import LAST, checkpoint_of, versions, what_a_run_saves
from downslope.runs.command_line import typed
from downslope.runs.console import explain, print_header, print_interrupted, print_result, say
from downslope.runs.folder import is_main_process
from downslope.runs.log import begin_log
from downslope.runs.prepared import take
from downslope.runs.result import Result
from downslope.runs.resuming import keep_changes
from downslope.runs.signals import Interrupted
from downslope.runs.stored import passes
from downslope.runs.whole_files import PARTIAL

log = logging.getLogger(__name__)

DIVERGED_BEYOND = 1e6
DIVERGED_WORDS = ("diverging", "too_large", "non_finite")
FOUND_NOTHING = (  # Lightning says so in its log alone
    "LearningRateFinder found no rate, so lr stays %g. It tries one rate a step and needs at least 13: raise "
    "`trainer.max_epochs`, or set the finder's `early_stop_threshold` to null."
)
CHOICES = ("device", "model", "optimizer", "data")  # that HPARAMS shows


@runtime_checkable
class HasFindings(Protocol):
    """A callback that has something to say in `result.json`."""

    def add_to(self, result: Result) -> None:
        """Fills in what it has found."""
        ...


def first_result(config: DictConfig, overrides: list[str]) -> Result:
    """Returns what is known of a run before it begins."""
    return Result(
        status="failed",
        learning_rate=config.get("lr"),
        monitor=config.get("monitor"),
        mode=config.get("mode", "min"),
        overrides=overrides,
        seed=config.get("seed"),
        versions=versions(),
    )


class Run:
    """Stands around a training: `with Run(config) as run`.

    However the block is left, `result.json` says how the run ended, and the terminal where to look next; an exception
    passes on.

    Args:
        config: As composed, without Hydra's own node.

    Attributes:
        folder: The run's.
        result: What is known so far.
        checkpoint: Where training continues from; None for a new run.
        has_test: Whether there is a test pass to be made.
    """

    def __init__(self, config: DictConfig) -> None:
        hydra = HydraConfig.get()
        self.config = config
        self.folder = Path(hydra.runtime.output_dir)
        self.checkpoint: Path | None = None
        self.has_test = False
        self.result = first_result(config, typed(hydra.overrides.task))
        self._trainer: Trainer | None = None
        self._outside = Outside(self)

    def __enter__(self) -> Self:
        begin_log()
        return self

    def begin(self, data: LightningDataModule, module: LightningModule, trainer: Trainer) -> None:
        """Prepares the fit of these parts: finds the checkpoint of a run that is resumed, and watches from outside.

        Raises:
            ValueError: The checkpoint is one of another model or of other data.
        """
        self._trainer, self._module, self._data = trainer, module, data
        self.has_test = any(passes(data, module, trainer, ["test"]))
        if self.config.get("resume"):
            self.checkpoint, state = take("checkpoint", lambda: checkpoint_of(self.folder, data, module))
            progress = state["progress"]
            with what_a_run_saves(self.checkpoint):
                metrics = {str(name): float(value) for name, value in progress["metrics"].items()}
            self.result.seconds, self.result.metrics = progress["seconds"], metrics
            self._outside.validated_at = progress.get("validated_at")
            if trainer.is_global_zero:
                for partial in (self.folder / LAST).parent.glob(f"*{PARTIAL}"):  # of a process that was killed
                    partial.unlink()
                rewind_event_files(self.folder, progress["event_files"])
        write_text(trainer, "yaml/configuration", OmegaConf.to_yaml(self.config))
        trainer.callbacks.insert(0, self._outside)  # type: ignore[attr-defined]
        self._started = time.perf_counter()

    def collect(self, trainer: Trainer) -> None:
        """Takes what the module has logged in the pass that has just ended: metrics of the last weights."""
        self.result.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop_the_clock()
            self._judge(trainer)
            self.result.num_validation_rows = num_rows(trainer.val_dataloaders)
            if trainer.enable_validation and self._outside.validated_at != trainer.global_step:
                trainer.validate(self._module, datamodule=self._data, verbose=False)
                self.collect(trainer)

    def _judge(self, trainer: Trainer) -> None:
        """Tells how the fit has ended: by the weights and the loss, and by what the callbacks have found."""
        result = self.result
        result.status = "diverged" if self._outside.has_diverged(self._module) else "completed"
        if self._outside.line:
            result.excess_loss = self._outside.line.excess(parameters_to_vector(self._module.parameters()))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, HasFindings):
                callback.add_to(result)
        if result.status == "diverged" and result.verdict not in DIVERGED_WORDS:
            result.verdict = "diverging"  # between two judgements

    def _stop_the_clock(self) -> None:
        if self._trainer and self._trainer.state.fn == TrainerFn.FITTING:
            self.result.seconds += time.perf_counter() - self._started
            self.result.num_optimizer_steps = self._trainer.global_step

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trainer:
            close_loggers(self._trainer)
        if error is None:
            if is_main_process():
                self._end()
            return
        self._stop_the_clock()
        if isinstance(error, Interrupted) and is_main_process():
            self.result.status = "interrupted"
            self.result.write(self.folder)
            print_interrupted(self.result, self.folder, error.saved)
        elif isinstance(error, Exception):
            log.info("failed", exc_info=error)
            if self.checkpoint and not self._outside.has_begun:  # what there was of the run stays as it is
                if any(
                    frame.f_code.co_filename == checkpoint_connector.__file__ for frame, _ in traceback.walk_tb(trace)
                ):
                    with what_a_run_saves(self.checkpoint):
                        raise error
                return
            self.result.status = "failed"
            if self._is_of_the_first_step(trace):
                model, data = (HydraConfig.get().runtime.choices.get(name) for name in ("model", "data"))
                error.add_note(f"in the first step of model={model} on data={data}: do they belong to the same task?")
            self.result.error = {"type": type(error).__name__, "message": explain(error)}
            with contextlib.suppress(OSError):  # a disk that is full must not hide the error
                self.result.write(self.folder)

    def _is_of_the_first_step(self, trace: TracebackType | None) -> bool:
        """Tells whether an error comes out of a new run's first training_step: a shape that does not fit, say."""
        if self._trainer is None or self.checkpoint or self._trainer.global_step:
            return False
        return any(frame.f_code.co_name == "training_step" for frame, _ in traceback.walk_tb(trace))

    def _end(self) -> None:
        result = self.result
        result.objective = result.metrics.get(result.monitor or "")
        if result.objective is None:
            text = "`monitor` names %s, which was never logged, so there is no objective. Logged: %s."
            log.warning(text, result.monitor, ", ".join(result.metrics) or "nothing")
        try:
            step = self._trainer.global_step if self._trainer else 0  # a step that was taken back counts: beside test/…
            write_hparams(self.folder, *line_of(result), step)
            result.write(self.folder)  # last: a run that is killed before it comes to all of this again
        finally:  # where the file cannot be written, the terminal is all there is
            print_result(result, self.folder)


def num_rows(loader: Any) -> int | None:
    """Returns how many rows a data loader serves, where it knows that."""
    with contextlib.suppress(TypeError):  # a stream of rows has no end
        return getattr(loader, "num_rows", 0) or len(getattr(loader, "dataset", ())) or None
    return None


def line_of(result: Result) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Returns what TensorBoard's HPARAMS say of a run: what was asked for, and what came of it."""
    choices = HydraConfig.get().runtime.choices
    asked = {"lr": result.learning_rate, **{name: choices.get(name) for name in CHOICES}}
    asked["verdict"] = result.verdict or result.status
    came: dict[str, float | None] = dict.fromkeys(sorted(result.metrics, key=lambda tag: tag != result.monitor))
    if result.excess_loss is not None:
        came["train/excess_loss"] = result.excess_loss
    return asked, came


class Outside(Callback):
    """Sees what only the fit itself can show: the optimizer, the closed form, the first loss and the last."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.has_begun = False
        self.validated_at: int | None = None
        self.line: LeastSquares | None = None
        self._first: float | None = None
        self._last: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        result = self.run.result
        result.device = str(trainer.strategy.root_device)
        result.learning_rate = _highest_rate(trainer)
        self.line = line = pl_module.least_squares() if isinstance(pl_module, HasLeastSquares) else None
        if line:
            result.least_squares_loss, result.sharpness = line.loss, line.sharpness
            result.largest_stable_learning_rate = line.largest_stable_learning_rate
        if any(hasattr(callback, "diverged") for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self.on_train_batch_end = None  # type: ignore[assignment,method-assign]  # Lightning passes it over
        if trainer.is_global_zero:
            print_header(self.run._data, pl_module, trainer, result)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.has_begun = True
        if trainer.is_global_zero:
            keep_changes(self.run.config, HydraConfig.get())  # a resume that is refused until here has changed nothing
        finder = any(isinstance(each, LearningRateFinder) for each in trainer.callbacks)  # type: ignore[attr-defined]
        if finder and not trainer.global_step:
            before, found = self.run.result.learning_rate, _highest_rate(trainer)
            self.run.result.learning_rate = found
            if not trainer.is_global_zero:
                return
            if found != before:
                say(f"LearningRateFinder: lr {found:g}")
            else:
                log.warning(FOUND_NOTHING, found)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._last = None if loss is None else loss.detach()
        if self._first is None and loss is not None:
            self._first = float(loss)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated_at = trainer.global_step

    def has_diverged(self, module: LightningModule) -> bool:
        """Tells whether a weight is not finite, or the loss is not or has grown out of all proportion."""
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters() if parameter.requires_grad):
            return True
        if self._first is None or self._last is None:
            return False
        limit = DIVERGED_BEYOND * self._first if self._first > 0 else math.inf
        return not (math.isfinite(self._last) and float(self._last) <= limit)


def _highest_rate(trainer: Trainer) -> float | None:
    """The first group's rate that has one: a schedule's highest, as far as torch knows it."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [group.get("max_lr", group.get("initial_lr", group.get("lr"))) for group in groups]
    return next((float(rate) for rate in rates if rate is not None), None)
