"""How does it do, and which learning rate should be tried? Said while it trains, early enough to save the run."""

import logging
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, TypeVar

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD

from downslope.callbacks.critical_learning_rate import CriticalLearningRate
from downslope.callbacks.flight_recorder import FlightRecorder
from downslope.callbacks.sharpness_monitor import SharpnessMonitor
from downslope.gradients.least_squares import HasLeastSquares, LeastSquares
from downslope.logs.tensorboard import write_markdown
from downslope.runs.result import Result
from downslope.steps.due import check_count
from downslope.steps.observer import Observer
from downslope.steps.optimizer_steps import OptimizerStep, ParameterNames, each_batch_is_a_step, held, num_steps
from downslope.verdict import Evidence, EvidenceCollector, Thresholds, Verdict, judge
from downslope.verdict.traces import broken_rows, input_size, traces_of_modules

log = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=Callback)


class VerdictMonitor(Observer):
    """Judges the run every so many steps, by what it has seen: `downslope.verdict`.

    The word stands in `Progress`; the sentence goes to TensorBoard's texts as `verdict` whenever the word changes. λ is
    taken from a `SharpnessMonitor` beside it, what stopped the run from a `FlightRecorder`, and a line that knows its
    closed form (`least_squares`) is asked for it.
    Training is the same to the bit: only what is there already is read. Of several optimizers the first is judged;
    under DDP the first process judges, by the loss of its own batches.

    Args:
        every_n_steps: Optimizer steps between two judgements; the first come after 8, 16 and 32 steps, because at ten
            times the limit float32 lasts for thirty, and one comes at the end, however the run ends.
        window: Steps before each judgement that are watched closely. They cost some vector products each.
        thresholds: Where one word ends and the next begins: any of `downslope.verdict.Thresholds` by name.
        print_verdict: Print the last sentence when `fit` ends.

    Attributes:
        verdict: The last one; None before the first.
        first_diverging_step: Steps taken when `diverging` was said first; None if it was not.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        window: int = 8,
        thresholds: dict[str, float] | None = None,
        print_verdict: bool = True,
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        check_count("window", window, least=3)  # a gradient is compared twice
        try:
            self.thresholds = Thresholds(**(thresholds or {}))
        except TypeError as error:
            known = ", ".join(Thresholds.__dataclass_fields__)
            raise ValueError(f"`thresholds` must be among {known}, got {', '.join(thresholds or {})}.") from error
        self.every_n_steps = every_n_steps
        self.window = window
        self.print_verdict = print_verdict
        self._resumed: dict[str, Any] | None = None
        self.reset()

    def reset(self) -> None:
        self.verdict: Verdict | None = None
        self.first_diverging_step: int | None = None
        self._collector: EvidenceCollector | None = None
        self._evidence: Evidence | None = None  # what the verdict was made of

    def state_dict(self) -> dict[str, Any]:
        return {"evidence": self._collector.state_dict()} if self._collector else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("evidence")

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        has_optimizer = any(each.param_groups for each in trainer.optimizers)
        is_one_batch = trainer.fast_dev_run  # type: ignore[attr-defined]  # which shows nothing
        if not has_optimizer or not trainer.is_global_zero or is_one_batch:
            self.listen_only()
            return
        optimizer = trainer.optimizers[0]
        if any(group.get("lr") is None for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no learning rate to judge")
        num_batches, a_step = trainer.num_training_batches, trainer.accumulate_grad_batches
        sees_all = trainer.limit_train_batches == 1.0 and num_batches <= a_step and trainer.world_size == 1
        names = ParameterNames(module)
        make = partial(EvidenceCollector, optimizer, names, self.every_n_steps, self.window, sees_all)
        make = partial(make, step=trainer.global_step, last_step=num_steps(trainer))
        self._collector = make()
        if self._resumed and not self.restored(self._collector.load_state_dict, self._resumed):
            self._collector = make()
        self._resumed = None
        if line := _line(trainer, module):
            table = getattr(getattr(trainer, "datamodule", None), "table", None)
            features = tuple(getattr(table, "feature_names", ()))
            self._collector.set_line(line, list(module.parameters()), self.thresholds.tolerance, features)
        if num_batches < a_step:
            text = "accumulate_grad_batches=%d exceeds the %d of an epoch: each step is %d/%d of their mean gradient."
            log.warning(text, a_step, num_batches, num_batches, a_step)
        self._losses: list[Tensor] = []
        self._differentiated_at = -1  # the batch, whose loss an optimizer may ask for many times
        self._taken = trainer.global_step
        critical = _beside(trainer, CriticalLearningRate)
        self._measured = critical.measured if critical else []
        self._is_quick = each_batch_is_a_step(trainer, module)
        steps = self.follow(trainer, after=self._after)
        if self._is_quick:
            steps.on_loss = self.guarded(self._catch)
        self._listen(self._collector)

    def _catch(self, loss: Tensor | None) -> None:
        self._losses = [] if loss is None else [loss.mean() if loss.ndim else loss]  # a copy of Lightning's own

    def _after(self, step: OptimizerStep) -> None:
        collector = self._collector
        if not collector or step.optimizer is not collector.optimizer:
            return
        collector.add_step()
        if self._measured and self._measured[-1][0] == step.step:
            collector.add_critical(*self._measured[-1][:2])
        if self._is_quick:
            self._add_loss(collector)
        if collector.is_watching or self._is_watching:  # else it sleeps: no hook is worth a look
            self._listen(collector)

    def _listen(self, collector: EvidenceCollector) -> None:
        self._is_watching = collector.is_watching
        self.listen("on_before_backward", when=self._is_watching)
        self.listen("on_train_batch_end", when=collector.is_due or not self._is_quick)

    def _add_loss(self, collector: EvidenceCollector) -> None:
        if self._losses:
            loss = torch.stack(self._losses).mean() if len(self._losses) > 1 else self._losses[0]
            collector.add_loss(loss, len(self._losses))
            self._losses.clear()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._collector:
            # A scaler has multiplied it; of several optimizers nobody knows whose it is; L-BFGS has it again and again.
            is_known = len(trainer.optimizers) == 1 and getattr(trainer.precision_plugin, "scaler", None) is None
            batch, before = trainer.fit_loop.total_batch_idx, self._differentiated_at
            self._differentiated_at = batch
            is_again = pl_module.automatic_optimization and batch == before
            self._collector.add_backward(loss if is_known and not is_again else None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        collector = self._collector
        assert collector
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and not self._is_quick:
            share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach().mean() * share)
        if collector.step == self._taken:
            return  # the batch was one of several before a step
        self._taken = collector.step
        self._add_loss(collector)
        if collector.is_due:
            if not collector.knows("input_size"):  # of this run, or of that which is resumed
                collector.add_traces(input_size=input_size(batch), **traces_of_modules(pl_module))
            self._judge(trainer, self._seen(trainer, collector))
        self.listen("on_train_batch_end", when=not self._is_quick)

    def _seen(self, trainer: Trainer, collector: EvidenceCollector, has_ended: bool = False) -> Evidence:
        still = _not_held(trainer)
        forgotten = [name for name, each in still.items() if each.requires_grad and each.grad is not None]
        monitor = _beside(trainer, SharpnessMonitor)
        return collector.evidence(still, monitor.sharpness if monitor else None, forgotten, has_ended)

    def _judge(self, trainer: Trainer, evidence: Evidence) -> None:
        last, self._evidence = self.verdict, evidence
        self.verdict = judge(evidence, self.thresholds)
        if self.verdict.word == "diverging" and self.first_diverging_step is None:
            self.first_diverging_step = evidence.step
        if last is None or last.word != self.verdict.word:
            write_markdown(trainer, "verdict", self.verdict.sentence, evidence.step)

    def add_to(self, result: Result) -> None:
        """Fills in the verdict, in words and figures."""
        if not (verdict := self.verdict):
            return
        result.verdict = verdict.word
        result.suggested_learning_rate = verdict.suggestion.learning_rate
        result.evidence |= {
            "sentence": verdict.sentence,
            "suggestion": verdict.suggestion.reason,
            "try": verdict.override,
            "hints": list(verdict.hints),
            "first_diverging_step": self.first_diverging_step,
            **verdict.figures,
        }

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge_the_rest(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._is_attached:
            self._judge_the_rest(trainer)
            self._print()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._is_attached:
            self._print()
        super().teardown(trainer, pl_module, stage)

    def _print(self) -> None:
        if self.print_verdict and self.verdict:
            print(f"Verdict: {self.verdict.sentence}")

    def _judge_the_rest(self, trainer: Trainer) -> None:
        """Gives the last word where the run ends between two judgements: what was not watched is as it was last."""
        if not self._collector:
            return
        last = self._evidence
        if last and last.step == self._collector.step:
            evidence = replace(last, has_ended=True)
        else:
            evidence = self._seen(trainer, self._collector, has_ended=True)
            unseen = [name for name, value in vars(evidence).items() if value is None] if last else []
            evidence = replace(evidence, **{name: getattr(last, name) for name in unseen})
        evidence = _as_recorded(evidence, trainer)
        if evidence.gradient_norm is not None or evidence.num_non_finite:
            self._judge(trainer, evidence)


def _as_recorded(evidence: Evidence, trainer: Trainer) -> Evidence:
    """What was seen, and what a FlightRecorder stopped the run for: perhaps in a step that was not watched."""
    recorder = _beside(trainer, FlightRecorder)
    if not recorder or not (record := recorder.flight_record):
        return evidence
    evidence = replace(evidence, broken_rows=broken_rows(record.batch))
    if record.diagnosis.reason == "growth":
        return replace(evidence, gradient_norm=inf, loss=record.offending.loss or evidence.loss)
    return replace(evidence, num_non_finite=max(1, evidence.num_non_finite))


def _beside(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    return next((each for each in trainer.callbacks if isinstance(each, kind)), None)  # type: ignore[attr-defined]


def _not_held(trainer: Trainer) -> dict[str, Parameter]:
    """The parameters that no optimizer can move now."""
    moving = {id(each) for each in held(trainer.optimizers) if each.requires_grad}
    return {name: each for name, each in trainer.lightning_module.named_parameters() if id(each) not in moving}


def _line(trainer: Trainer, module: LightningModule) -> LeastSquares | None:
    """The closed form of what the optimizer minimises; None where it is not known."""
    optimizer = trainer.optimizers[0]
    decays = {float(group.get("weight_decay") or 0.0) for group in optimizer.param_groups}
    line = module.least_squares() if isinstance(module, HasLeastSquares) else None
    if not line or decays == {0.0}:
        return line
    return line.decayed(decays.pop()) if len(decays) == 1 and isinstance(optimizer, SGD) else None
