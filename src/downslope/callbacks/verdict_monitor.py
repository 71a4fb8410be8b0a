"""How does it do, and which learning rate should be tried? Said while it trains, early enough to save the run."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from downslope.callbacks.sharpness_monitor import SharpnessMonitor
from downslope.gradients.least_squares import HasLeastSquares
from downslope.logs.tensorboard import step_writer
from downslope.steps.optimizer_steps import (
    OptimizerStep,
    OptimizerSteps,
    check_frequency,
    num_steps,
    parameter_names,
)
from downslope.verdict import EvidenceCollector, Thresholds, Verdict, judge

log = logging.getLogger(__name__)


class VerdictMonitor(Callback):
    """Judges the run every so many steps, by what it has seen: `downslope.verdict`.

    The word stands in `Progress`; the sentence goes to TensorBoard's texts as `verdict` whenever the word changes. λ is
    taken from a `SharpnessMonitor` beside it, and a line that knows its closed form (`least_squares`) is asked for it.
    Training is the same to the bit: only what is there already is read. Of several optimizers the first is judged;
    under DDP the first process judges, by the loss of its own batches.

    Args:
        every_n_steps: Optimizer steps between two judgements; the first come after 8, 16 and 32 steps, because at ten
            times the limit float32 lasts for thirty, and one comes at the end.
        window: Steps before each judgement that are watched closely. They cost some vector products each.
        thresholds: Where one word ends and the next begins: any of `downslope.verdict.Thresholds` by name.

    Attributes:
        verdict: The last one; None before the first.
        first_diverging_step: Steps taken when `diverging` was said first; None if it was not.
    """

    def __init__(self, every_n_steps: int = 50, window: int = 8, thresholds: dict[str, float] | None = None) -> None:
        check_frequency("every_n_steps", every_n_steps)
        check_frequency("window", window)
        if window < 3:
            raise ValueError(
                f"`window` must be at least 3, got {window}. This is because a gradient is compared twice."
            )
        try:
            self.thresholds = Thresholds(**(thresholds or {}))
        except TypeError as error:
            known = ", ".join(Thresholds.__dataclass_fields__)
            raise ValueError(f"`thresholds` must be of {known}; got {', '.join(thresholds or {})}.") from error
        self.every_n_steps = every_n_steps
        self.window = window
        self.verdict: Verdict | None = None
        self.first_diverging_step: int | None = None
        self._collector: EvidenceCollector | None = None
        self._steps: OptimizerSteps | None = None
        self._resumed: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.verdict = self.first_diverging_step = None

    def state_dict(self) -> dict[str, Any]:
        return {"evidence": self._collector.state_dict()} if self._collector else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("evidence")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.optimizers or not trainer.is_global_zero:
            return
        optimizer = trainer.optimizers[0]
        self._collector = EvidenceCollector(
            optimizer,
            parameter_names(pl_module),
            self.every_n_steps,
            self.window,
            full_batch=trainer.limit_train_batches == 1.0
            and trainer.num_training_batches <= trainer.accumulate_grad_batches
            and trainer.world_size == 1,
            step=trainer.global_step,
            last_step=num_steps(trainer),
        )
        if self._resumed:
            self._collector.load_state_dict(self._resumed)
            self._resumed = None
        held = {id(p) for each in trainer.optimizers for group in each.param_groups for p in group["params"]}
        self._frozen = {
            name: p.numel() for name, p in pl_module.named_parameters() if not p.requires_grad or id(p) not in held
        }
        self._sharpness = [each for each in trainer.callbacks if isinstance(each, SharpnessMonitor)]  # type: ignore[attr-defined]
        decays = any(group.get("weight_decay") for group in optimizer.param_groups)  # another optimum than the line's
        line = pl_module.least_squares() if isinstance(pl_module, HasLeastSquares) and not decays else None
        if line:
            self._collector.set_line(line, list(pl_module.parameters()), self.thresholds.tolerance, _names(trainer))
        self._losses: list[Tensor] = []
        self._taken = trainer.global_step
        self._steps = OptimizerSteps(trainer, after=self._after)

    def _after(self, step: OptimizerStep) -> None:
        if self._collector and step.optimizer is self._collector.optimizer:
            self._attempt(self._collector.add_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._collector and self._collector.is_watching:
            self._attempt(self._collector.add_leftover)

    def _attempt(self, look: Callable[[], None]) -> None:
        """Looks; whatever a foreign module meets there, watching never ends a training."""
        try:
            look()
        except Exception as error:
            self._collector = None
            log.warning("VerdictMonitor is off from here on: %s: %s", type(error).__name__, error)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        collector = self._collector
        if not collector:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach() if loss.dim() == 0 else loss.detach().mean())
        if collector.step == self._taken:
            return  # the batch was one of several before a step
        self._taken = collector.step
        if self._losses:
            collector.add_loss(self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).mean())
            self._losses.clear()
        if collector.is_due:
            self._attempt(lambda: self._judge(trainer))

    def _judge(self, trainer: Trainer) -> None:
        assert self._collector
        sharpness = next((each.sharpness for each in self._sharpness), None)
        last = self.verdict
        self.verdict = judge(self._collector.evidence(self._frozen, sharpness), self.thresholds)
        if self.verdict.word == "diverging" and self.first_diverging_step is None:
            self.first_diverging_step = self._collector.step
        if last is None or last.word != self.verdict.word:
            self._write(trainer, self._collector.step, self.verdict.sentence)

    def _write(self, trainer: Trainer, step: int, sentence: str) -> None:
        writer = step_writer(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and writer.is_open:
                writer.attempt(logger, lambda logger: logger.experiment.add_text("verdict", sentence, step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._steps:
            self._steps.detach()
            self._steps = None


def _names(trainer: Trainer) -> Sequence[str]:
    """The columns' own names, where the data has a table."""
    table = getattr(getattr(trainer, "datamodule", None), "table", None)
    return tuple(getattr(table, "feature_names", ()))
