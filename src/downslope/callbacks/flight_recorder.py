"""Why did it blow up? The last steps before a run diverged, kept as an aeroplane's recorder keeps them."""

import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from downslope.callbacks.optimizer_steps import OptimizerStep, OptimizerSteps, flat, leave_out_idle_hooks, wake
from downslope.callbacks.snapshot import Copies, Snapshot
from downslope.callbacks.unclipped_gradients import may_be_clipped
from downslope.flight_record import FILE_NAME, Diagnosis, FlightRecord, StepRecord, as_numbers, diagnose
from downslope.gradients.finiteness import wide_norms

OnDivergence = Literal["stop", "raise", "continue"]
TINY = 2**18  # elements of all the ring's steps: so many stay in a processor's cache
SMALL = 4096  # elements a tensor: smaller ones are measured as one vector, larger ones take longer to copy


class DivergenceError(RuntimeError):
    """A loss, gradient or parameter is not finite, or the loss has grown out of all proportion."""


@dataclass(slots=True, eq=False)
class _Measured:
    """A step, or a batch without one: raw, because most are never looked at but for their sum.

    Attributes:
        values: The norms of gradients and then of parameters: a tensor until they have been read from the device.
        sizes: Where `values` are the elements themselves, how many each has: their norms are taken when somebody looks.
    """

    step: int
    epoch: int
    batch_index: int
    batch: Any
    loss: Tensor | float | None = None
    optimizer: str | None = None
    learning_rate: float | list[float] | None = None
    gradient_names: Sequence[str] = ()
    parameter_names: Sequence[str] = ()
    values: Tensor | list[float] = field(default_factory=list)
    sizes: list[int] | None = None

    def total(self) -> float:
        """Returns the sum of all that was read: if it is finite, everything is."""
        values = self.values
        return (self.loss or 0.0) + (torch.dot(values, values).item() if self.sizes else sum(values))  # type: ignore[arg-type, return-value]

    def record(self) -> StepRecord:
        """Returns what was read, by name."""
        if self.sizes:
            self.values, self.sizes = wide_norms(self.values.split(self.sizes)).tolist(), None  # type: ignore[union-attr]
        num = len(self.gradient_names)
        arrived = dict(zip(self.gradient_names, self.values[:num], strict=True))
        parameters = dict(zip(self.parameter_names, self.values[num:], strict=True))
        stepped = parameters or arrived  # not those of another optimizer
        gradients = {name: norm for name, norm in arrived.items() if name in stepped}
        values = (self.optimizer, self.learning_rate, self.loss, gradients, parameters)
        return StepRecord(self.step, self.epoch, self.batch_index, *values)  # type: ignore[arg-type]


class _Layout:
    """The tensors of an optimizer's steps, as long as they are the same: some gradients, then all parameters.

    Args:
        step: An optimizer's, just taken.
        names: Of the parameters.
        num_steps: Of the ring.
    """

    def __init__(self, step: OptimizerStep, names: Mapping[Parameter, str], num_steps: int) -> None:
        self.moved, self.parameters = step.moved, step.parameters
        self.gradient_names = [names.get(each, "?") for each in self.moved]
        self.parameter_names = [names.get(each, "?") for each in self.parameters]
        tensors = [*step.gradients, *self.parameters]
        self.sizes = sizes = [each.numel() for each in tensors]
        kinds = {(each.device.type, each.dtype, each.layout) for each in tensors}
        plain = kinds in [{("cpu", dtype, torch.strided)} for dtype in (torch.float32, torch.float64)]
        self.is_tiny = plain and num_steps * sum(sizes) <= TINY
        self.is_small = plain and all(sizes) and sum(sizes) <= SMALL * len(sizes)
        if self.is_small and not self.is_tiny:
            self._vector = torch.empty(sum(sizes), dtype=tensors[0].dtype)
            self._parts = [part.view(each.shape) for part, each in zip(self._vector.split(sizes), tensors, strict=True)]
            self._starts = [0, *accumulate(sizes[:-1])]

    def norms(self, tensors: list[Tensor]) -> list[float]:
        """Returns the norm of each of many small tensors, as parts of one vector: quicker than one by one."""
        torch._foreach_copy_(self._parts, tensors)
        squares = self._vector.mul_(self._vector).numpy()
        with np.errstate(over="ignore"):
            norms: list[float] = np.sqrt(np.add.reduceat(squares, self._starts)).tolist()
        return norms if isfinite(sum(norms)) else wide_norms(tensors).tolist()


class FlightRecorder(Callback):
    """Stops a run that diverges before its weights are spoiled, and writes down how it came to that.

    Diverged: a loss, gradient or parameter is not finite, or the loss exceeds `diverged_beyond` times the first one of
    its optimizer that was not 0. The step is then taken back: parameters, optimizer state and buffers are, to the bit,
    those before it, `flight_record.json` (`downslope.flight_record`) is written, and training ends as any training
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
        self._steps: deque[_Measured | StepRecord] = deque(maxlen=num_steps)
        self._unjudged: list[_Measured] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.flight_record = None
        self.diverged = False
        self._first_losses = {}
        self._steps.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"first_losses": self._first_losses, "steps": [asdict(step) for step in self._records()]}

    def _records(self) -> list[StepRecord]:
        return [step.record() if isinstance(step, _Measured) else step for step in self._steps]

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
        self._arrived: tuple[list[str], Tensor | list[float]] | None = None
        self._step_of_batch: _Measured | None = None
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
        self._names = {parameter: name for name, parameter in pl_module.named_parameters()}
        self._layouts: dict[str, _Layout] = {}
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
            self._arrived = self._gradients(trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._automatic or self._scaler:
            self._arrived = self._gradients([optimizer])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.diverged:
            return
        measured = self._step_of_batch
        if self._is_quick:
            wake(self, "on_train_batch_end", awake=False)
            assert measured is not None
            measured.batch_index, measured.batch = batch_idx, batch
        elif measured is None:
            measured = _Measured(max(trainer.global_step, self._num_steps_taken), *self._batch)
            if not self._scaler:  # which skips a step whose gradients are inf, and tries a smaller scale
                measured.gradient_names, measured.values = self._gradients(trainer.optimizers)
            self._unjudged.append(measured)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if measured.loss is None and isinstance(loss, Tensor):
            self._take_loss(measured, loss.detach() if loss.ndim == 0 else loss.detach().sum())
        self._judge_if_due()

    def _take_loss(self, measured: _Measured, loss: Tensor) -> None:
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
            del self._optimizer_steps, self._snapshot, self._buffers, self._layouts
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
        measured = _Measured(step.step, *self._batch, None, step.name, _learning_rate(step.optimizer))
        self._step_of_batch = measured
        self._measure_step(step, measured)
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
        loss, self._loss = self._loss, None
        rate, batch_index = _learning_rate(step.optimizer), max(self._batches.ready - 1, 0)
        measured = _Measured(step.step, self._epoch, batch_index, None, loss, step.name, rate)
        self._measure_step(step, measured)
        _read([measured])
        if self._diagnose(measured) is None:
            return
        self._unjudged.append(measured)
        self._step_of_batch = measured
        wake(self, "on_train_batch_end")

    def _measure_step(self, step: OptimizerStep, measured: _Measured) -> None:
        """Looks at the gradients as they arrived, and at the parameters that the step has made."""
        parameters, layout = step.parameters, self._layouts.get(step.name)
        if layout is None or layout.moved is not step.moved or layout.parameters is not parameters:
            layout = self._layouts[step.name] = _Layout(step, self._names, self.num_steps)
        measured.parameter_names = layout.parameter_names
        if self._arrived:
            (measured.gradient_names, norms), self._arrived = self._arrived, None
            measured.values = _joined(norms, _measure(parameters))
            return
        measured.gradient_names = layout.gradient_names
        both = [*step.gradients, *parameters]
        if layout.is_tiny:
            measured.values, measured.sizes = flat(both), layout.sizes
        else:
            measured.values = layout.norms(both) if layout.is_small else _measure(both)

    def _gradients(self, optimizers: Iterable[Optimizer]) -> tuple[list[str], Tensor | list[float]]:
        """The names of the parameters that have a gradient, and the gradients' norms."""
        held = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
        present = [(self._names.get(each, "?"), each.grad) for each in held if each.grad is not None]
        return [name for name, _ in present], _measure([gradient for _, gradient in present])

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
        _read(unjudged)
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

    def _diagnose(self, measured: _Measured) -> Diagnosis | None:
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

    def _record(self, measured: _Measured, diagnosis: Diagnosis, restored_to_step: int | None, writes: bool) -> None:
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


def _measure(tensors: Sequence[Tensor]) -> Tensor | list[float]:
    """The norms of tensors, on a CPU as numbers at once: there nothing has to be waited for."""
    norms = wide_norms(tensors)
    return norms.tolist() if norms.device.type == "cpu" else norms


def _joined(first: Tensor | list[float], second: Tensor | list[float]) -> Tensor | list[float]:
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    place = next(each for each in (first, second) if isinstance(each, Tensor))
    return torch.cat([torch.as_tensor(each).to(place) for each in (first, second)])


def _read(unjudged: Sequence[_Measured]) -> None:
    """Turns what is still on the device into numbers, all in one transfer."""
    waiting = [each for each in unjudged if isinstance(each.values, Tensor) and not each.sizes]
    losses = [each for each in unjudged if isinstance(each.loss, Tensor)]
    if not waiting and len(losses) == 1:  # on a CPU
        losses[0].loss = losses[0].loss.item()  # type: ignore[union-attr]
        return
    tensors = [each.loss for each in losses] + [each.values for each in waiting]
    values = iter(torch.cat([tensor.reshape(-1) for tensor in tensors]).tolist() if tensors else [])  # type: ignore[union-attr]
    for each in losses:
        each.loss = next(values)
    for each in waiting:
        each.values = list(islice(values, len(each.values)))
