"""`last.ckpt` is the newest state, which a run resumes from; `best.ckpt` has the weights of least validation loss."""

import copy
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from downslope.callbacks.flight_recorder import FlightRecorder
from downslope.logs.tensorboard import announce_restart, event_files, flush_step_writer
from downslope.runs.checkpoints import (
    SafeCheckpointIO,
    check_same,
    fingerprint,
    keep_previous,
    name_of,
    versions,
    what_a_run_saves,
)
from downslope.runs.signals import Interrupted, StopRequest
from downslope.steps.due import check_count
from downslope.steps.random_state import RandomState

log = logging.getLogger(__name__)

Progress = dict[str, Any]
SCHEDULE = ("lr_schedulers", "global_step", "epoch")  # Lightning's own entries of a checkpoint


class Checkpoints(Checkpoint):
    """Saves the state of the run, and never one that holds a non-finite weight.

    A run that is killed and resumed (`trainer.fit(ckpt_path=…)`) ends in the same bits as one that was not. So it is
    saved where nothing is half done: after an optimizer step that no validation follows, and before an epoch. Beside
    what Lightning saves, a checkpoint has, in plain data and for every process, the random states, the metrics' sums,
    and where in the epoch it is. An epoch is resumed by making its order of rows again and passing over what was
    seen. SIGINT and SIGTERM stop at such a place, and save there.

    The best weights are kept in memory and written just before the next `last.ckpt`: at every improvement, saving
    would take longer than a short run's training. The `last.ckpt` before stays as `previous.ckpt`.

    Args:
        folder: Where `last.ckpt` and `best.ckpt` go.
        monitor: The logged metric that says which weights are best.
        mode: Whether its least or its greatest value is best, `min` or `max`.
        every_n_seconds: How much work a killed run may lose; null for no limit.
        every_n_steps: The same in optimizer steps.
        max_share: Of the time, so much at most goes into `every_n_seconds`: what takes long to write is written less
            often; 1 for no limit.
    """

    def __init__(
        self,
        folder: str,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        every_n_seconds: float | None = 30.0,
        every_n_steps: int | None = None,
        max_share: float = 0.02,
    ) -> None:
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps)
        if not 0 < max_share <= 1:
            raise ValueError(f"`max_share` must be a number above 0 and at most 1, got {max_share}.")
        if mode not in ("min", "max"):
            raise ValueError(f"`mode` must be min or max, got {mode!r}.")
        self.folder = Path(folder)
        self.monitor = monitor
        self.sign = 1.0 if mode == "min" else -1.0
        self.every_n_seconds = every_n_seconds
        self.every_n_steps = every_n_steps
        self.max_share = max_share
        self._stop = StopRequest()
        self.best = math.inf
        self._best_weights: dict[str, Any] | None = None  # not written yet
        self._seconds_before = 0.0
        self._batch: int | None = None  # to begin with after a resume; known while this callback saves
        self._validated_at: int | None = None  # the optimizer step of the last validation
        self._resumed: Progress | None = None
        self._new_settings: list[dict[str, Any]] | None = None  # of the groups of an optimizer whose schedule is new
        self._sums: dict[str, dict[str, Any]] = {}  # of what was logged in the epoch that is resumed in its middle

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._io = trainer.strategy.checkpoint_io = SafeCheckpointIO()
        self._stop = StopRequest()
        self._started_at = time.perf_counter()
        self._save_took = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed:  # their states are loaded next
            file = self.folder / "last.ckpt"
            check_same(file, "optimizer", self._resumed["optimizers"], [name_of(each) for each in trainer.optimizers])
            schedulers = [name_of(each) for each in _schedulers(trainer)]
            if not pl_module.automatic_optimization or len(trainer.optimizers) > 1:  # the module knows when they step
                check_same(file, "scheduler", self._resumed["schedulers"], schedulers)
            elif schedulers != self._resumed["schedulers"]:
                self._new_settings = _begin_schedule(trainer, self._resumed)
        self._epoch_random = RandomState()  # the first epoch's iterator is made right after this
        self._keeps_epoch_random = True

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "progress" in checkpoint:
            self._resumed = checkpoint["progress"] | {name: checkpoint[name] for name in SCHEDULE}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
        if self._resumed:
            with what_a_run_saves(self.folder / "last.ckpt"):
                self._go_on(trainer, pl_module, self._resumed)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._step = trainer.global_step
        self._is_shared = trainer.world_size > 1
        self._stop.listen()

    def _go_on(self, trainer: Trainer, module: LightningModule, progress: Progress) -> None:
        self._resumed = None
        mine = progress["processes"][trainer.global_rank]
        self._seconds_before, self._validated_at = progress["seconds"], progress.get("validated_at")
        for name, state in mine["metrics"].items():
            _restore(module.get_submodule(name), state, module.device)
        self._sums = mine.get("sums", {})
        self._epoch_random = RandomState.from_state_dict(mine["epoch_random"])
        self._epoch_random.restore()
        _start_at(trainer, progress["batch"])
        if progress["batch"]:
            RandomState.from_state_dict(mine["random"]).restore()
        else:
            trainer.fit_loop.epoch_loop.restarting = False  # a new epoch, not the rest of one
        self._keeps_epoch_random = progress["batch"] == 0
        epochs = trainer.fit_loop.epoch_progress  # of a saved one that has begun Lightning forgets `ready`
        epochs.current.ready = epochs.current.completed + epochs.total.ready - epochs.total.completed
        _follow_settings(trainer, progress["settings"], self._new_settings)
        announce_restart(trainer)
        for logger in trainer.loggers if progress.get("unlogged") else ():
            logger.log_metrics(*progress["unlogged"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._keeps_epoch_random:
            self._epoch_random = RandomState()
        self._keeps_epoch_random = False
        self._save_and_stop_if_due(trainer, pl_module, batch=0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sums:
            self._sums = _add_sums(trainer, self._sums)
        step, before = trainer.global_step, self._step
        self._step = step
        if step == before or not (self._is_shared or self._stop.number or self._is_due(step)):
            return  # soon: this is asked after every step
        if not trainer.should_stop and not _something_follows(trainer, batch_idx):
            self._save_and_stop_if_due(trainer, pl_module, batch=batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._validated_at = trainer.global_step
            self._keep_best(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop._restarting = False  # else Lightning leaves out a plateau's step of the epoch that was resumed
        if not trainer.enable_validation:  # then it is a metric of the training epoch, if of any
            self._keep_best(trainer, pl_module)

    def _keep_best(self, trainer: Trainer, module: LightningModule) -> None:
        if self.monitor not in trainer.callback_metrics:
            return
        value = self.sign * float(trainer.callback_metrics[self.monitor])
        if value < self.best and _is_finite(module):
            self.best = value
            weights = copy.deepcopy(trainer.strategy.lightning_module_state_dict())
            place = {"epoch": trainer.current_epoch, "global_step": trainer.global_step}
            self._best_weights = {**place, "state_dict": weights}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_random = RandomState()  # of the epoch that might follow
        if error := self._save(trainer, pl_module, batch=0):
            raise OSError(f"The last weights cannot be written to {self.folder}: {error.strerror or error}.") from error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop.forget()

    def _save_and_stop_if_due(self, trainer: Trainer, module: LightningModule, batch: int) -> None:
        """All processes together, whatever their clocks say and whichever of them the signal reached."""
        due, signal = int(self._is_due(trainer.global_step)), self._stop.number
        if self._is_shared:
            wishes = torch.tensor([float(due), float(signal)], device=trainer.strategy.root_device)
            due, signal = (int(each) for each in trainer.strategy.all_gather(wishes).amax(dim=0))
        if due or signal:
            if _has_diverged(trainer):  # it ends by itself, with weights of before: nothing to resume from
                return
            started = time.monotonic()
            error = self._save(trainer, module, batch)
            self._save_took = time.monotonic() - started
        if signal:
            raise Interrupted(signal, saved=self._saved_step == trainer.global_step and not error)

    def _is_due(self, step: int) -> bool:
        if self.every_n_steps and step - self._saved_step >= self.every_n_steps:
            return True
        if self.every_n_seconds is None:
            return False
        return time.monotonic() - self._saved_at >= max(self.every_n_seconds, self._save_took / self.max_share)

    def _save(self, trainer: Trainer, module: LightningModule, batch: int) -> OSError | None:
        """Writes what is to be written, and returns what kept it from being so."""
        error = None
        if self._best_weights:
            rest = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)  # what Lightning loads a module by
            del rest["loops"]
            trainer.strategy.save_checkpoint(rest | self._best_weights, self.folder / "best.ckpt")
            error = self._warn("best.ckpt")
            self._best_weights = self._best_weights if error else None
        if _is_finite(module) and not _is_spoiled(trainer):
            self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
            self._batch = batch
            flush_step_writer(trainer)
            if trainer.is_global_zero:
                keep_previous(self.folder / "last.ckpt")
            trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)  # all of it, that is
            self._batch = None
            error = self._warn("last.ckpt") or error
        return error

    def _warn(self, name: str) -> OSError | None:
        if self._io.error:
            log.warning("Cannot write %s; training continues: %s", self.folder / name, self._io.error)
        return self._io.error

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._batch is None:  # somebody else saves: Lightning's LearningRateFinder before the fit, say
            return
        mine = {
            "random": RandomState().state_dict(),
            "epoch_random": self._epoch_random.state_dict(),
            "metrics": {name: _state(part) for name, part in pl_module.named_modules() if isinstance(part, Metric)},
            "sums": _sums_of(trainer) | self._sums if self._batch else {},
        }
        processes = [mine]
        if trainer.world_size > 1:
            processes = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(processes, mine)
        checkpoint["progress"] = {
            "batch": self._batch,
            "processes": processes,
            "seconds": self._seconds_before + time.perf_counter() - self._started_at,
            "versions": versions(),
            "model": name_of(pl_module),
            "data": fingerprint(getattr(trainer, "datamodule", None)),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "optimizers": [name_of(each) for each in trainer.optimizers],
            "schedulers": [name_of(each) for each in _schedulers(trainer)],
            "settings": [_settings(optimizer) for optimizer in trainer.optimizers],
            "event_files": event_files(trainer),
            "validated_at": self._validated_at,
            "unlogged": _unlogged(trainer) if self._batch else None,
        }


def _unlogged(trainer: Trainer) -> tuple[dict[str, float], int] | None:
    """What a step has logged by `self.log`, and where: Lightning passes it on only after the step has been saved."""
    if not trainer._logger_connector.should_update_logs:
        return None
    values = convert_tensors_to_scalars(trainer._logger_connector.metrics["log"])
    if not values:
        return None
    step = int(values.pop("step", trainer.fit_loop.epoch_loop._batches_that_stepped))
    return {"epoch": trainer.current_epoch, **values}, step


def _sums_of(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What `self.log(on_epoch=True)` has added up of this epoch: Lightning keeps it in no checkpoint."""
    results = trainer.fit_loop.epoch_loop._results
    return {
        key: {name: value.detach().cpu() for name, value in result.metric_state.items()}
        for key, result in results.items()
        if result.is_tensor and result.meta.on_epoch
    }


def _add_sums(trainer: Trainer, sums: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adds those of before a resume to those of the first batch after it, in the order of a run that never stopped.

    Returns:
        Of what has not been logged again yet: Lightning knows how a value is reduced only when it is.
    """
    results = trainer.fit_loop.epoch_loop._results
    for key, states in sums.items():
        if key in results:
            metric = results[key]
            is_extreme = metric.meta.is_max_reduction or metric.meta.is_min_reduction
            for name, before in states.items():
                now = getattr(metric, name)
                add = metric.meta.reduce_fx if is_extreme else torch.add
                setattr(metric, name, add(before.to(now.device), now))
    return {key: states for key, states in sums.items() if key not in results}


def _has_diverged(trainer: Trainer) -> bool:
    """Has every step judged that is about to be saved: what waits for it is in no checkpoint."""
    for recorder in _recorders(trainer):
        recorder.judge()
    return any(recorder.diverged and recorder.on_divergence == "stop" for recorder in _recorders(trainer))


def _is_spoiled(trainer: Trainer) -> bool:
    """Tells whether the weights are those after a step that diverged."""
    stopped = [each for each in _recorders(trainer) if each.diverged and each.on_divergence != "continue"]
    return not all(each.is_taken_back for each in stopped)


def _recorders(trainer: Trainer) -> list[FlightRecorder]:
    return [each for each in trainer.callbacks if isinstance(each, FlightRecorder)]  # type: ignore[attr-defined]


def _something_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Tells whether more than the next batch comes after this one: the epoch's end, or a validation within it."""
    if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or batch_idx + 1 == trainer.num_training_batches:
        return True
    if not trainer.enable_validation or trainer.val_check_batch in (None, math.inf):
        return False
    num_batches = batch_idx + 1 if trainer.check_val_every_n_epoch else trainer.fit_loop.total_batch_idx + 1
    return num_batches % int(trainer.val_check_batch) == 0


def _start_at(trainer: Trainer, batch: int) -> None:
    """Makes the epoch's iterator again, and passes over the batches that were seen.

    Ours jump there. Any other loader makes them again, with the random numbers that it made them with.
    """
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    loaders = fetcher.combined_loader.flattened
    jumps = all(hasattr(loader, "start") for loader in loaders)
    for loader in loaders if jumps else []:
        loader.start = batch
    iter(fetcher)
    for _ in range(0 if jumps else batch):
        next(fetcher)
    fetcher.fetched = 0  # Lightning adds the batches that it has counted


def _schedulers(trainer: Trainer) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer was made with, as far as it is plain data."""
    return {name: value for name, value in optimizer.defaults.items() if isinstance(value, int | float | tuple)}


def _begin_schedule(trainer: Trainer, saved: Progress) -> list[dict[str, Any]]:
    """Brings a schedule that the run did not have to where it would stand, had the run begun with it.

    A plateau is waited for from here on.

    Returns:
        What it makes of the settings of the optimizer's groups, which its state is loaded over.
    """
    saved["lr_schedulers"].clear()  # the former schedule's
    for config in trainer.lr_scheduler_configs:
        count = saved["global_step"] if config.interval == "step" else saved["epoch"]
        with warnings.catch_warnings(action="ignore"):  # torch: the optimizer has not stepped yet
            for _ in range(0 if config.reduce_on_plateau else count // config.frequency):
                config.scheduler.step()  # type: ignore[call-arg]  # a plateau's needs the metric, and has none here
    return [{name: value for name, value in group.items() if name != "params"} for group in _groups(trainer)]


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _follow_settings(trainer: Trainer, saved: list[dict[str, Any]], new: list[dict[str, Any]] | None) -> None:
    """Follows what the configuration says today: the optimizer's state has the settings of the checkpoint."""
    if new is not None:
        for group, settings in zip(_groups(trainer), new, strict=True):
            group.update(settings)
        return
    for optimizer, before in zip(trainer.optimizers, saved, strict=True):
        changed = {name: value for name, value in _settings(optimizer).items() if before.get(name) != value}
        rate = changed.pop("lr", None)
        for group in optimizer.param_groups:
            group.update(changed)
            for key in ("lr", "initial_lr") if rate is not None else ():
                if key in group:
                    group[key] *= rate / before["lr"]
        for scheduler in _schedulers(trainer) if rate is not None else ():
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [base * (rate / before["lr"]) for base in scheduler.base_lrs]


def _state(metric: Metric) -> dict[str, Any]:
    states = apply_to_collection(metric.metric_state, Tensor, lambda value: value.detach().cpu())
    return {"update_count": metric.update_count, "states": states}


def _restore(metric: Any, state: dict[str, Any], device: torch.device) -> None:
    for name, value in state["states"].items():
        setattr(metric, name, apply_to_collection(value, Tensor, lambda value: value.to(device)))
    metric._update_count = state["update_count"]
    metric._computed = None


def _is_finite(module: LightningModule) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
