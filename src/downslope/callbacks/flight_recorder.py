"""Why did it blow up? The last steps before a run diverged, kept as an aeroplane's recorder keeps them."""

import contextlib
import logging
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from downslope.runs.result import Result
from downslope.runs.whole_files import whole_file
from downslope.steps.due import check_count
from downslope.steps.measured_step import MeasuredStep, Norms, StepNorms
from downslope.steps.observer import Observer, say_off
from downslope.steps.optimizer_steps import OptimizerStep, ParameterNames, each_batch_is_a_step, held, overrides
from downslope.steps.replay import Replay, can_replay
from downslope.steps.snapshot import Copies, Snapshot
from downslope.steps.unclipped_gradients import may_be_clipped
from downslope.verdict.flight_record import FILE_NAME, Diagnosis, FlightRecord, StepRecord, as_numbers, diagnose

log = logging.getLogger(__name__)

GROWN = 1.5  # how much parameters grow where a loss does so by them
BLOCK = 16  # steps
SMALL = 2**24  # elements that optimizers hold: more are copied before each step where that was asked for alone

OnDivergence = Literal["stop", "raise", "continue"]
Mode = Literal["exact", "block", "late"]


class DivergenceError(RuntimeError):
    """A loss, gradient or parameter is not finite, or the loss has grown out of all proportion."""


class FlightRecorder(Observer):
    """Stops a run that diverges before its weights are spoiled, and writes down how it came to that.

    Diverged: a loss, gradient or parameter is not finite, or the loss exceeds `diverged_beyond` times the first one of
    its optimizer that was not 0, and the parameters have grown with it: a loss that grows alone was weighed anew, and
    is compared with from there on. What was infinite before training is left alone, and so is a gradient that somebody
    mends before it is applied. `flight_record.json` is written, and training ends as any that is stopped early:
    validated, saved, `fit` returns. What that costs is the `mode`:

    - exact: The step is taken back: parameters, optimizer state and buffers are, to the bit, those before it. So all of
      these are copied before each step, into as much memory again (3 times the parameters' under Adam), and on a GPU
      each judgement waits for the step. `trainer.global_step` counts the step that was taken back.
    - block: The same for 16 steps at a time: copied before the first, judged after the last, their batches kept until
      then. Those before the one that diverged are taken again, and have to come out as they were, to the bit. Where
      they do not, or a step takes more than one batch and `loss(batch)`, the weights stay the copy's, and the message
      says so. What no optimizer holds, averages or a target network, may have seen the steps since.
    - late: Nothing is copied, and nothing waited for: a step is judged when the next one is done, by its loss and its
      gradients, and by its weights before `Checkpoints` saves them. They stay as the steps have left them, and its
      last checkpoint is one of before; another callback may save the step that diverged.

    It is judged when the step is done, because a finite gradient can still overflow a weight, and LBFGS tries several.
    With several processes a judgement is one exchange: `every_n_steps` makes them rarer. A step that a GradScaler skips
    is no divergence.

    Args:
        num_steps: How many of the last good steps are kept.
        folder: Where the file goes; by default where the logger writes.
        on_divergence: `stop`; `raise` a `DivergenceError` out of `fit`, the step taken back too; or `continue`, as if
            nobody watched, after the file is written.
        diverged_beyond: How much the loss may grow; infinity for any finite loss.
        every_n_steps: Steps between two judgements; an epoch's end and a checkpoint wait for one, too. More than 1 is
            a block of so many.
        mode: `exact`, `block` or `late`; None for exact where the optimizers hold at most 16 million elements, and for
            late, which is said, where they hold more.
        max_batch_values: Of each tensor in the offending batch so many values at most are written, in whole rows.

    Attributes:
        diverged: Whether it did, on any process.
        is_taken_back: Whether the weights are those before the step.
        flight_record: How; None if it did not, or if only another process saw it.
    """

    deliberate = (DivergenceError,)

    def __init__(
        self,
        num_steps: int = 100,
        folder: str | None = None,
        on_divergence: OnDivergence = "stop",
        diverged_beyond: float = 1e6,
        every_n_steps: int = 1,
        mode: Mode | None = None,
        max_batch_values: int = 10_000,
    ) -> None:
        check_count("num_steps", num_steps)
        check_count("every_n_steps", every_n_steps)
        check_count("max_batch_values", max_batch_values)
        if on_divergence not in get_args(OnDivergence):
            raise ValueError(f"`on_divergence` must be stop, raise or continue, got {on_divergence!r}.")
        if mode is not None and mode not in get_args(Mode):
            raise ValueError(f"`mode` must be exact, block, late or null, got {mode!r}.")
        if not diverged_beyond > 1:
            raise ValueError(f"`diverged_beyond` must be a number greater than 1, got {diverged_beyond}.")
        self.num_steps = num_steps
        self.folder = folder
        self.on_divergence = on_divergence
        self.diverged_beyond = diverged_beyond
        self.every_n_steps = BLOCK if mode == "block" and every_n_steps == 1 else every_n_steps
        self.mode = mode
        self.max_batch_values = max_batch_values
        self.reset()

    def reset(self) -> None:
        self.flight_record: FlightRecord | None = None
        self.diverged = self.is_taken_back = False
        self._first: dict[str, tuple[float, float]] = {}  # an optimizer's first loss, and its parameters' norm
        self._steps: deque[MeasuredStep | StepRecord] = deque(maxlen=self.num_steps)

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
        first = {name: list(values) for name, values in self._first.items()}
        return {"first": first, "steps": [asdict(step) for step in self._records()]}

    def _records(self) -> list[StepRecord]:
        return [step if isinstance(step, StepRecord) else step.record() for step in self._steps]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        steps = [StepRecord(**step) for step in state_dict["steps"]]
        self._first = {name: (loss, norm) for name, (loss, norm) in state_dict.get("first", {}).items()}
        self._steps = deque(steps, maxlen=self.num_steps)

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._automatic = module.automatic_optimization
        self._folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        self._is_late = self._mode(trainer) == "late"
        self._keeps = not self._is_late and self.on_divergence != "continue"
        is_block = self.every_n_steps > 1
        self._replay = Replay(trainer, module) if is_block and self._keeps and can_replay(trainer, module) else None
        with contextlib.suppress(OSError):  # then it says so where it has something to write
            self._folder.mkdir(parents=True, exist_ok=True)
        self._norms = StepNorms(ParameterNames(module), trainer.optimizers)
        self._snapshot, self._buffers = Snapshot(trainer.optimizers), Copies()
        self._unjudged: list[MeasuredStep] = []
        self._num_steps = self._first_step = trainer.global_step
        self._batch_count = trainer.fit_loop.epoch_loop.batch_progress.current
        self._batch: Any = None
        self._loss: Tensor | None = None
        self._arrived: Norms | None = None
        self._measured: MeasuredStep | None = None  # the step of this batch
        self._is_blind = False
        self._mends = overrides(module, "on_before_optimizer_step", "configure_gradient_clipping")
        # Then there is nobody to agree with, and a step can be judged before its batch has ended.
        self._is_quick = each_batch_is_a_step(trainer, module) and not self._is_late
        self._sleep_where_nothing_is_to_see(may_be_clipped(trainer, module))
        steps = self.follow(trainer, self._before_step, self._after_step)
        if self._is_quick:
            steps.on_loss = self.guarded(self._catch)
        self.on_train_epoch_start(trainer, module)
        with torch.no_grad():
            self._keep()  # for a step that is taken before the first batch

    def _mode(self, trainer: Trainer) -> Mode:
        num_elements = sum(each.numel() for each in held(trainer.optimizers))
        if self.mode or num_elements <= SMALL or self.on_divergence == "continue":
            return self.mode or "exact"
        log.warning(
            "FlightRecorder keeps no copy of a model of %.0f million elements: a run that diverges ends one step "
            "late ('late'). With mode='exact' the step is taken back.",
            num_elements / 1e6,
        )
        return "late"

    def _sleep_where_nothing_is_to_see(self, clips: bool) -> None:
        """Each hook takes longer than all that is computed at a step."""
        needed = {
            "on_train_batch_start": not self._is_quick or self.every_n_steps > 1,
            "on_before_zero_grad": not self._automatic or self._scaler,
            "on_before_backward": not self._automatic,
            "on_after_backward": not self._automatic and not self._scaler,
            "on_before_optimizer_step": clips if self._automatic else self._scaler,
            "on_train_batch_end": not self._is_quick,
        }
        self.listen_only(*(name for name, is_needed in needed.items() if is_needed))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch = trainer.current_epoch
        self._buffered = [part._buffers for part in pl_module.modules() if part._buffers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._measured, self._arrived = batch, None, None
        if not self._is_quick:
            with torch.no_grad():
                self._keep()

    def _before_step(self, step: OptimizerStep) -> None:
        """Keeps what a step, of several in a batch the second, is taken back to."""
        if self._is_quick:
            self._keep()
            if self._replay:
                self._replay.before_step()
        elif self._measured and not self._automatic:
            self._judge_if_due()
            self._keep(buffers=False)

    def _keep(self, buffers: bool = True) -> None:
        if not self._keeps:
            return
        if self._unjudged and not self._snapshot.is_complete():
            self.judge()  # a parameter has come or gone: here a block begins
        if self._unjudged or self.diverged:
            return
        self._copy(buffers)
        if self._replay:
            self._replay.begin()

    def _copy(self, buffers: bool = True) -> None:
        self._snapshot.take_all()
        if self._buffered and buffers:  # batch normalization sees a batch before its loss is known
            self._buffers.take([each for part in self._buffered for each in part.values() if each is not None])

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._loss = None  # here a window of accumulation begins, and each of LBFGS's trials

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss = loss.detach().sum()
        if self._scaler:
            loss = loss / self._scaler.scale(torch.ones_like(loss))
        self._loss = loss if self._loss is None else self._loss + loss

    def _catch(self, loss: Tensor | None) -> None:
        self._loss = loss

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The one moment before a clip of the user's own, which makes a NaN in one gradient a NaN in all.
        self._arrived = self._norms.of_gradients(trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._arrived = self._norms.of_gradients([optimizer])

    def _after_step(self, step: OptimizerStep) -> None:
        self._num_steps = step.step + 1
        if self.diverged:
            self._take_back()  # training ends, but not before the module's own code does
            return
        measured = self._measured = self._new(step.step)
        rates = [float(group["lr"]) for group in step.optimizer.param_groups if group.get("lr") is not None]
        measured.optimizer, measured.learning_rate = step.name, rates[0] if len(rates) == 1 else rates or None
        measured.arrived, self._arrived = self._arrived, None
        if self._replay:
            self._replay.after_step()
        is_whole = not self._is_late or not step.count
        self._look(lambda: self._norms.measure(step, measured, parameters=is_whole))
        if self._is_quick or not self._automatic:  # otherwise it comes with what `training_step` returns
            measured.loss, self._loss = self._loss, None
        if not self._is_quick:
            self._unjudged.append(measured)
            if measured.loss is not None:
                self._judge_if_due()
            return
        if measured.loss is None:  # it was not the step of a batch
            measured.batch = None
        if self.every_n_steps == 1:
            measured.read()
        if self.every_n_steps > 1 or self._diagnose(measured):
            self._unjudged.append(measured)
        if len(self._unjudged) >= self.every_n_steps:
            self.listen("on_train_batch_end")  # by then other observers have seen what is taken back

    def _new(self, step: int) -> MeasuredStep:
        return MeasuredStep(step, self._epoch, max(self._batch_count.ready - 1, 0), self._batch)

    def _look(self, take: Callable[[], None]) -> None:
        """Measures. One of several processes that cannot any more still agrees with the others, who wait for it."""
        try:
            if not self._is_blind:
                take()
        except Exception as error:
            if self._trainer.world_size == 1:
                raise
            self._is_blind = True
            say_off("FlightRecorder of this process", error)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.diverged:
            return
        if self._is_quick:
            self.listen("on_train_batch_end", when=False)
            if self._unjudged and self._unjudged[-1].loss is not None:
                self._unjudged[-1].batch = batch
            self.judge()
            return
        measured = self._measured or self._batch_without_a_step()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if measured.loss is None and isinstance(loss, Tensor):
            self._take_loss(measured, loss.detach().sum())
        self._judge_if_due()

    def _batch_without_a_step(self) -> MeasuredStep:
        """Looks at what a step will find; not where the module may mend it before, or be passing it over by itself."""
        measured = self._new(max(self._trainer.global_step, self._num_steps))
        if self._mends or (not self._automatic and self._num_steps > self._first_step):
            return measured
        if not self._scaler:  # which skips a step whose gradients are inf, and tries a smaller scale
            self._look(lambda: setattr(measured, "arrived", self._norms.of_gradients(self._trainer.optimizers)))
        self._unjudged.append(measured)
        return measured

    def _take_loss(self, measured: MeasuredStep, loss: Tensor) -> None:
        """Takes what came out of a batch: with automatic optimization its share of what the step differentiated."""
        if self._automatic:
            self._loss = loss if self._loss is None else self._loss + loss
        measured.loss = loss
        if measured.optimizer and self._loss is not None:
            measured.loss, self._loss = self._loss, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:  # of several only this one may have failed
            with contextlib.suppress(DivergenceError):
                self.judge()  # what was raised may have come of it
        super().on_exception(trainer, pl_module, exception)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.judge()  # its weights are the module's own: what is taken back is so there, too

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.judge()  # whoever saves the best weights does it after this

    on_train_epoch_end = on_train_end = on_validation_start  # and no epoch shall begin after a step that diverged

    def _judge_if_due(self) -> None:
        if self._is_late and self._unjudged:
            self._unjudged[-1].send()
        if len(self._unjudged) >= self.every_n_steps + self._is_late:
            self._attempt(self._judge, len(self._unjudged) - self._is_late)

    def judge(self) -> None:
        """Judges the steps that wait for it: whoever saves the weights asks first."""
        if self._is_attached and self._unjudged:
            self._attempt(self._look, lambda: self._norms.look_again(self._unjudged[-1]))
            self._attempt(self._judge, len(self._unjudged))

    def _judge(self, num_steps: int) -> None:
        """Judges the first of those that wait. Here, and nowhere else, the device is waited for."""
        if self.diverged:
            return
        unjudged, self._unjudged = self._unjudged[:num_steps], self._unjudged[num_steps:]
        diagnosis = None
        for measured in unjudged:
            measured.read()
            if diagnosis := self._diagnose(measured):
                break
        self.diverged, writes = self._agree(diagnosis)
        if self.diverged:
            restored_to = self._take_back(unjudged[: unjudged.index(measured) + 1])
            if diagnosis:
                self._record(measured, diagnosis, restored_to, writes)
        for each in unjudged:
            each.batch = None
        if self.diverged:
            self._stop()

    def _diagnose(self, measured: MeasuredStep) -> Diagnosis | None:
        """Judges a step, and remembers a good one."""
        name, loss, first_loss = measured.optimizer, measured.loss, self._first_loss(measured)
        has_grown = first_loss is not None and loss is not None and loss > self.diverged_beyond * abs(first_loss)
        is_odd = (has_grown or not measured.is_finite()) and not measured.was_mended()
        if is_odd and (diagnosis := diagnose(measured.record(), first_loss, self.diverged_beyond)):
            return diagnosis
        if name:
            self._steps.append(measured)
            if loss and isfinite(loss) and name not in self._first:
                self._first[name] = (float(loss), measured.size())
        return None

    def _first_loss(self, measured: MeasuredStep) -> float | None:
        """What a step's loss is compared with; a micro-batch's with none.

        A loss that grows out of all proportion, and the parameters not at all, was weighed anew: in this case itself.
        """
        first = self._first.get(measured.optimizer or "")
        loss = measured.loss
        if first is None or loss is None:
            return None
        if self.diverged_beyond * abs(first[0]) < loss < inf:
            self._norms.look_again(measured)
            measured.read()
            if (size := measured.size()) < GROWN * first[1]:
                first = self._first[measured.optimizer or ""] = (float(loss), size)
        return first[0]

    def _agree(self, diagnosis: Diagnosis | None) -> tuple[bool, bool]:
        """Whether any process has diverged, and whether this one writes the file: the one whose own loss it was."""
        if self._trainer.world_size == 1:
            return diagnosis is not None, True
        severity = 0 if diagnosis is None else 2 if diagnosis.reason in ("loss", "growth") else 1
        device = self._trainer.strategy.root_device
        severities = self._trainer.strategy.all_gather(torch.tensor([severity], device=device)).flatten().tolist()
        return any(severities), severities.index(max(severities)) == self._trainer.global_rank

    def _take_back(self, steps: Sequence[MeasuredStep] = ()) -> int | None:
        """Puts back what was kept, takes all steps since but the last again, and returns which is the next one now."""
        if not self._keeps:
            return None
        self.is_taken_back = True
        self._restore()
        if self._replay and len(steps) > 1:
            if self._replay.run([each.batch for each in steps]):
                self._copy()  # for a step that the module still takes
                return steps[-1].step
            self._restore()
        return steps[0].step if steps else None

    def _restore(self) -> None:
        self._snapshot.restore()
        self._buffers.restore()

    def _record(self, measured: MeasuredStep, diagnosis: Diagnosis, restored_to_step: int | None, writes: bool) -> None:
        self.flight_record = FlightRecord(
            diagnosis=diagnosis,
            offending=measured.record(),
            first_loss=self._first.get(measured.optimizer or "", (None,))[0],
            restored_to_step=restored_to_step,
            steps=self._records(),
            batch=as_numbers(measured.batch, self.max_batch_values),
        )
        if writes:
            try:
                with whole_file(self._folder / FILE_NAME) as stream:
                    stream.write(self.flight_record.json().encode())
            except Exception as error:  # a full disk: the run ends all the same
                warnings.warn(f"Cannot write {self._folder / FILE_NAME}: {error}", stacklevel=2)

    def _stop(self) -> None:
        where = f"See {self._folder / FILE_NAME}."
        if self._is_late:
            where += " The weights are those after that step; the last checkpoint from before it has good ones."
        elif (record := self.flight_record) and record.restored_to_step not in (None, record.offending.step):
            reason = (
                "came out differently when repeated"
                if self._replay
                else "can only be repeated where each is one batch's, and the module has a method `loss(batch)`"
            )
            where += f" The weights are those before step {record.restored_to_step}: the steps since {reason}."
        message = f"Diverged: {self.flight_record.sentence()}. {where}" if self.flight_record else f"Diverged. {where}"
        if self.on_divergence == "raise":
            raise DivergenceError(message)
        if self.on_divergence == "stop":
            self._trainer.should_stop = True
            # Lightning would go on until these are reached.
            self._trainer.fit_loop.min_epochs = 0
            self._trainer.fit_loop.epoch_loop.min_steps = None
        warnings.warn(message, stacklevel=2)
