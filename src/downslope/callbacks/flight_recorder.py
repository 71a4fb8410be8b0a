"""Why did it blow up? The last steps before a run diverged, kept as an aeroplane's recorder keeps them."""

import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.optim import Optimizer

from downslope.runs.result import Result
from downslope.steps.measured_step import MeasuredStep, Norms, StepNorms, read
from downslope.steps.optimizer_steps import OptimizerStep, OptimizerSteps, leave_out_idle_hooks, wake
from downslope.steps.snapshot import Copies, Snapshot
from downslope.steps.unclipped_gradients import may_be_clipped
from downslope.verdict.flight_record import FILE_NAME, Diagnosis, FlightRecord, StepRecord, as_numbers, diagnose

OnDivergence = Literal["stop", "raise", "continue"]


class DivergenceError(RuntimeError):
    """A loss, gradient or parameter is not finite, or the loss has grown out of all proportion."""


class FlightRecorder(Callback):
    """Stops a run that diverges before its weights are spoiled, and writes down how it came to that.

    Diverged: a loss, gradient or parameter is not finite, or the loss exceeds `diverged_beyond` times the first one of
    its optimizer that was not 0. The step is then taken back: parameters, optimizer state and buffers are, to the bit,
    those before it, `flight_record.json` is written, and training ends as any training
    that is stopped early: validated, saved, `fit` returns. `trainer.global_step` counts the step that was taken back.

    It is judged when the step is done, with automatic optimization at the end of its batch, which is right for every
    optimizer: a gradient is known only in the middle of the step, LBFGS tries several, and a finite one can still
    overflow a weight. So parameters and optimizer states are copied before each step, in as much memory again. On a GPU
    a judgement is one synchronisation, with several processes one exchange: `every_n_steps` makes them rarer.
    A step that a GradScaler skips is no divergence.

    Args:
        num_steps: How many of the last good steps are kept.
        folder: Where the file goes; by default where the logger writes.
        on_divergence: `stop`; `raise` a `DivergenceError` out of `fit`, the step taken back too; or `continue`, as if
            nobody watched, after the file is written.
        diverged_beyond: How much the loss may grow; infinity for any finite loss.
        every_n_steps: Steps between two judgements; an epoch's end and a checkpoint wait for one, too. With more than 1
            the weights go back by up to so many steps, and as many batches are kept in memory.
        max_batch_values: Of each tensor in the offending batch so many values at most are written, in whole rows.

    Attributes:
        diverged: Whether it did, on any process.
        flight_record: How; None if it did not, or if only another process saw it.
    """

    def __init__(
        self,
        num_steps: int = 100,
        folder: str | None = None,
        on_divergence: OnDivergence = "stop",
        diverged_beyond: float = 1e6,
        every_n_steps: int = 1,
        max_batch_values: int = 10_000,
    ) -> None:
        for name, value in (
            ("num_steps", num_steps),
            ("every_n_steps", every_n_steps),
            ("max_batch_values", max_batch_values),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value}.")
        if on_divergence not in get_args(OnDivergence):
            raise ValueError(f"`on_divergence` must be stop, raise or continue, got {on_divergence!r}.")
        if not diverged_beyond > 1:
            raise ValueError(f"`diverged_beyond` must be a number greater than 1, got {diverged_beyond}.")
        self.num_steps = num_steps
        self.folder = folder
        self.on_divergence = on_divergence
        self.diverged_beyond = diverged_beyond
        self.every_n_steps = every_n_steps
        self.max_batch_values = max_batch_values
        self.flight_record: FlightRecord | None = None
        self.diverged = False
        self._first_losses: dict[str, float] = {}
        self._steps: deque[MeasuredStep | StepRecord] = deque(maxlen=num_steps)
        self._unjudged: list[MeasuredStep] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.flight_record = None
        self.diverged = False
        self._first_losses = {}
        self._steps.clear()

    def add_to(self, result: Result) -> None:
        """Fills in what the recorder saw: the weights are already those before the offending step."""
        if not self.diverged:
            return
        result.status = "diverged"
        if record := self.flight_record:
            result.evidence["diverged"] = record.sentence()
            if record.restored_to_step is not None:
                result.num_optimizer_steps = record.restored_to_step

    def state_dict(self) -> dict[str, Any]:
        return {"first_losses": self._first_losses, "steps": [asdict(step) for step in self._records()]}

    def _records(self) -> list[StepRecord]:
        return [step.record() if isinstance(step, MeasuredStep) else step for step in self._steps]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first_losses = dict(state_dict["first_losses"])
        self._steps = deque((StepRecord(**step) for step in state_dict["steps"]), maxlen=self.num_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._automatic = pl_module.automatic_optimization
        self._clips = may_be_clipped(trainer, pl_module)
        leave_out_idle_hooks(self, *self._idle_hooks())
        self._folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        self._unjudged = []
        self._snapshot = Snapshot(trainer.optimizers)
        self._buffers = Copies()
        self._num_steps_taken = trainer.global_step
        self._loss: Tensor | None = None
        self._arrived: tuple[list[str], Norms] | None = None
        self._step_of_batch: MeasuredStep | None = None
        self.on_train_epoch_start(trainer, pl_module)
        self._is_quick = self._knows_the_loss_in_the_step(pl_module)
        if self._is_quick:
            self._optimizer_steps = OptimizerSteps(trainer, self._keep, self._after_quick_step)
            self._optimizer_steps.on_loss = self._catch
            wake(self, "on_train_batch_start", "on_train_batch_end", awake=False)
            return
        before = None if self._automatic else self._before_step
        self._optimizer_steps = OptimizerSteps(trainer, before, self._after_step)
        self.on_train_batch_start(trainer, pl_module, None, 0)  # for a step that is taken before the first batch

    def _idle_hooks(self) -> list[str]:
        """Those that this run has no use for, of which each takes longer than all that is computed at a step."""
        idle = {
            "on_before_zero_grad": self._automatic and not self._scaler,
            "on_before_backward": self._automatic,
            "on_after_backward": self._automatic or self._scaler,
            "on_before_optimizer_step": not (self._clips if self._automatic else self._scaler),
        }
        return [name for name, is_idle in idle.items() if is_idle]

    def _knows_the_loss_in_the_step(self, module: LightningModule) -> bool:
        """Each batch is a step, and there is nobody to agree with: it can be judged before the batch has ended."""
        trainer = self._trainer
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return (
            self._automatic
            and not self._scaler
            and trainer.accumulate_grad_batches == trainer.world_size == self.every_n_steps == 1
            and not any(isinstance(each, GradientAccumulationScheduler) for each in callbacks)
            and type(module).optimizer_step is LightningModule.optimizer_step
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch, self._batches = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        self._norms = StepNorms(names, self.num_steps)
        self._buffered = [part._buffers for part in pl_module.modules() if part._buffers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.diverged:
            return
        self._batch = (trainer.current_epoch, batch_idx, batch)
        self._step_of_batch = self._arrived = None
        with torch.no_grad():
            self._keep()

    def _keep(self, step: OptimizerStep | None = None) -> None:
        """Copies what a step may have to be taken back to."""
        if self.on_divergence != "continue" and not self._unjudged and not self.diverged:
            self._snapshot.take()
            if self._buffered:  # batch normalization sees a batch before its loss is known
                self._buffers.take([each for part in self._buffered for each in part.values() if each is not None])

    def _catch(self, loss: Tensor | None) -> None:
        self._loss = loss

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._loss = None  # here a window of accumulation begins, and each of LBFGS's trials

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss = loss.detach() if loss.ndim == 0 else loss.detach().sum()
        if self._scaler:
            loss = loss / self._scaler.scale(torch.ones_like(loss))
        self._loss = loss if self._loss is None else self._loss + loss

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The one moment before a clip of the user's own, which makes a NaN in one gradient a NaN in all.
        if not self._automatic and not self._scaler:
            self._arrived = self._norms.of_gradients(trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._automatic or self._scaler:
            self._arrived = self._norms.of_gradients([optimizer])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.diverged:
            return
        if self._is_quick:
            wake(self, "on_train_batch_end", awake=False)
            bad = self._unjudged[-1] if self._unjudged else None
            if bad and bad.loss is not None:  # otherwise it was not the step of a batch
                bad.batch_index, bad.batch = batch_idx, batch
            self.judge()
            return
        measured = self._step_of_batch
        if measured is None:
            measured = MeasuredStep(max(trainer.global_step, self._num_steps_taken), *self._batch)
            if not self._scaler:  # which skips a step whose gradients are inf, and tries a smaller scale
                measured.gradient_names, measured.values = self._norms.of_gradients(trainer.optimizers)
            self._unjudged.append(measured)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if measured.loss is None and isinstance(loss, Tensor):
            self._take_loss(measured, loss.detach() if loss.ndim == 0 else loss.detach().sum())
        self._judge_if_due()

    def _take_loss(self, measured: MeasuredStep, loss: Tensor) -> None:
        """Takes what came out of a batch: with automatic optimization its share of what the step differentiated."""
        if self._automatic:
            self._loss = loss if self._loss is None else self._loss + loss
        measured.loss = loss
        if measured.optimizer and self._loss is not None:
            measured.loss, self._loss = self._loss, None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.judge()  # whoever saves the best weights does it after this

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.judge()  # the next epoch shall not begin after a step that diverged

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.judge()
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if hasattr(self, "_optimizer_steps"):
            self._optimizer_steps.detach()
            self._step_of_batch = None
            del self._optimizer_steps, self._snapshot, self._buffers, self._norms
            vars(self).pop("_batch", None)

    def _before_step(self, step: OptimizerStep) -> None:
        if self._step_of_batch is None or self.diverged:
            return
        self._judge_if_due()
        if not self._unjudged and self.on_divergence != "continue":
            self._snapshot.take()  # the second step of one batch is taken back alone

    def _after_step(self, step: OptimizerStep) -> None:
        self._num_steps_taken = step.step + 1
        if self.diverged:
            self._take_back()  # training ends, but not before the module's own code does
            return
        measured = self._step_of_batch = self._measure(step, *self._batch)
        self._unjudged.append(measured)
        if not self._automatic and self._loss is not None:  # otherwise it comes with what `training_step` returns
            measured.loss, self._loss = self._loss, None
            self._judge_if_due()

    def _after_quick_step(self, step: OptimizerStep) -> None:
        """Judges a step of automatic optimization at once; one that is bad waits for the end of its batch.

        By then other observers have seen what is taken back.
        """
        if self.diverged:
            self._take_back()
            return
        measured = self._measure(step, self._epoch, max(self._batches.ready - 1, 0), None)
        measured.loss, self._loss = self._loss, None
        read([measured])
        if self._diagnose(measured):
            self._unjudged.append(measured)
            wake(self, "on_train_batch_end")

    def _measure(self, step: OptimizerStep, epoch: int, batch_index: int, batch: Any) -> MeasuredStep:
        """Takes down a step but for its loss, with gradients as they arrived."""
        rate = _learning_rate(step.optimizer)
        measured = MeasuredStep(step.step, epoch, batch_index, batch, optimizer=step.name, learning_rate=rate)
        self._norms.measure(step, measured, self._arrived)
        self._arrived = None
        return measured

    def _judge_if_due(self) -> None:
        if len(self._unjudged) >= self.every_n_steps:
            self.judge()

    def judge(self) -> None:
        """Judges the steps that wait for it: whoever saves the weights asks first.

        Here, and nowhere else, the device is waited for.
        """
        unjudged, self._unjudged = self._unjudged, []
        if not unjudged or self.diverged:
            return
        read(unjudged)
        diagnosis = None
        for measured in unjudged:
            diagnosis = self._diagnose(measured)
            if diagnosis:
                break
        diverged, writes = self._agree(diagnosis)
        if not diverged:
            return
        self.diverged = True
        self._take_back()
        if diagnosis:
            back_to = None if self.on_divergence == "continue" else unjudged[0].step
            self._record(measured, diagnosis, back_to, writes)
        self._end()

    def _diagnose(self, measured: MeasuredStep) -> Diagnosis | None:
        """Judges a step, and remembers a good one."""
        loss, name = measured.loss, measured.optimizer
        first_loss = self._first_losses.get(name) if name else None  # a micro-batch's is not yet one to compare
        grown = bool(first_loss and loss is not None and loss > self.diverged_beyond * abs(first_loss))
        if grown or not isfinite(measured.total()):
            diagnosis = diagnose(measured.record(), first_loss, self.diverged_beyond)
            if diagnosis:
                return diagnosis
        if name:
            self._steps.append(measured)
            measured.batch = None
            if loss and first_loss is None:
                self._first_losses[name] = float(loss)
        return None

    def _agree(self, diagnosis: Diagnosis | None) -> tuple[bool, bool]:
        """Whether any process has diverged, and whether this one writes the file: the one whose own loss it was."""
        if self._trainer.world_size == 1:
            return diagnosis is not None, True
        severity = 0 if diagnosis is None else 2 if diagnosis.reason in ("loss", "growth") else 1
        device = self._trainer.strategy.root_device
        severities = self._trainer.strategy.all_gather(torch.tensor([severity], device=device)).flatten().tolist()
        return any(severities), severities.index(max(severities)) == self._trainer.global_rank

    def _take_back(self) -> None:
        if self.on_divergence != "continue":
            self._snapshot.restore()
            self._buffers.restore()

    def _record(self, measured: MeasuredStep, diagnosis: Diagnosis, restored_to_step: int | None, writes: bool) -> None:
        self.flight_record = FlightRecord(
            diagnosis=diagnosis,
            offending=measured.record(),
            first_loss=self._first_losses.get(measured.optimizer or ""),
            restored_to_step=restored_to_step,
            steps=self._records(),
            batch=as_numbers(measured.batch, self.max_batch_values),
        )
        if writes:
            try:
                self.flight_record.write(self._folder)
            except OSError as error:
                warnings.warn(f"Cannot write {self._folder / FILE_NAME}: {error}", stacklevel=2)

    def _end(self) -> None:
        where = f"See {self._folder / FILE_NAME}."
        message = f"Diverged: {self.flight_record.sentence()}. {where}" if self.flight_record else f"Diverged. {where}"
        if self.on_divergence == "raise":
            raise DivergenceError(message)
        if self.on_divergence == "stop":
            self._trainer.should_stop = True
            # Lightning would go on until these are reached.
            self._trainer.fit_loop.min_epochs = 0
            self._trainer.fit_loop.epoch_loop.min_steps = None
        warnings.warn(message, stacklevel=2)


def _learning_rate(optimizer: Optimizer) -> float | list[float]:
    groups = optimizer.param_groups
    return float(groups[0]["lr"]) if len(groups) == 1 else [float(group["lr"]) for group in groups]
