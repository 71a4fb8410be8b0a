"""What the learning rate does: how far each step goes, whether it turns back, and what it buys."""

import logging
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter

from downslope.callbacks.optimizer_steps import OptimizerStep, OptimizerSteps, check_frequency, parameter_names
from downslope.callbacks.replay import replay, why_no_replay
from downslope.gradients.norms import norms, total_norm
from downslope.gradients.random_state import RandomState
from downslope.gradients.steps import cosine, descent_ratio, update_norms
from downslope.tensorboard import close_step_writer, step_writer

log = logging.getLogger(__name__)


class LearningRateEffects(Callback):
    """Logs the learning rate and its effect at every optimizer step, with or without a scheduler, in both modes.

    At step t, from θₜ to θₜ₊₁ along the gradient g that was applied (after clipping):

    - `learning_rate/<optimizer>`: η, the nominal rate; `…/<group>` where there are several parameter groups.
    - `update_ratio/total`, `update_ratio/<parameter>`: ‖θₜ₊₁ − θₜ‖ / ‖θₜ‖.
    - `learning_rate_effect/effective`: ‖θₜ₊₁ − θₜ‖ / ‖g‖. It is η for plain SGD, and is not for Adam.
    - `learning_rate_effect/gradient_cosine`: of g and the gradient of the step before: +1 creeping, −1 bouncing.
    - `learning_rate_effect/descent_ratio`: what the step changed the loss by, on the same batches under the same
      random numbers, over the −η‖g‖² that the gradient promised: 1 small step, ½ the best one, below 0 uphill. It
      costs one more forward a batch, which leaves no trace in training.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        descent_ratio: Whether to take it; where it cannot be had, the log says once why.

    Raises:
        ValueError: The frequency is below 1.
    """

    def __init__(self, every_n_steps: int = 50, descent_ratio: bool = True) -> None:
        check_frequency("every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self.descent_ratio = descent_ratio
        self._steps: OptimizerSteps | None = None
        self._replays = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._writer = step_writer(trainer)
        if not self._writer.is_open:
            return
        self._names = parameter_names(pl_module)
        self._before_step: dict[Parameter, Tensor] = {}
        self._last_gradients: dict[Parameter, Tensor] = {}
        self._window: list[tuple[Any, int, RandomState, Tensor]] = []
        self._promise: Tensor | None = None
        self._steps = OptimizerSteps(trainer, before=self._before, after=self._after)
        reason = why_no_replay(trainer, pl_module) if self.descent_ratio else None
        self._replays = self.descent_ratio and reason is None
        if reason:
            log.warning("learning_rate_effect/descent_ratio is off. This is because %s.", reason)

    def _is_due(self, step: OptimizerStep) -> bool:
        return step.count % self.every_n_steps == 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._steps and self._replays and self._is_due(self._steps.states[0]):
            self._random_state = RandomState()
            self._watched = True
            if not self._window:
                self._window_began_at = trainer.global_step
        else:
            self._watched = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._replays or not self._watched:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if not isinstance(loss, Tensor):
            self._replays = False
            log.warning("learning_rate_effect/descent_ratio is off. This is because `training_step` returns no loss.")
            return
        self._window.append((batch, batch_idx, self._random_state, loss))
        if self._promise is not None:
            self._write_descent_ratio(trainer, pl_module, self._promise)
        skipped = trainer.global_step != self._window_began_at  # by a GradScaler, which calls no optimizer
        if self._promise is not None or skipped:
            self._window.clear()
            self._promise = None

    def _write_descent_ratio(self, trainer: Trainer, module: LightningModule, promise: Tensor) -> None:
        """The gradient was that of the batches' losses added up, each divided by the length of a full window."""
        share = 1.0 / trainer.accumulate_grad_batches
        before = torch.stack([loss for *_, loss in self._window]).sum()
        after = torch.stack([replay(trainer, module, *place) for *place, _ in self._window]).sum() * share
        ratio = descent_ratio(before, after, promise)
        self._writer.add(self._promised_at, ["learning_rate_effect/descent_ratio"], ratio[None])

    def _before(self, step: OptimizerStep) -> None:
        if self._is_due(step):
            parameters = step.parameters
            copies = torch._foreach_clone([parameter.detach() for parameter in parameters])
            self._before_step = dict(zip(parameters, copies, strict=True))

    def _after(self, step: OptimizerStep) -> None:
        if self._is_due(step):
            self._measure(step)
        if (step.count + 1) % self.every_n_steps == 0:
            self._last_gradients.update(
                (parameter, parameter.grad.detach().clone())
                for parameter in step.parameters
                if parameter.grad is not None
            )

    def _measure(self, step: OptimizerStep) -> None:
        """Writes what is due at a step that has just been taken."""
        moved = [parameter for parameter in step.parameters if parameter.grad is not None]
        if not moved:
            return
        gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
        changes, sizes = update_norms([self._before_step[parameter] for parameter in moved], moved)
        gradient_norms = norms(gradients)
        change, gradient = total_norm(changes), total_norm(gradient_norms)
        total = change / total_norm(norms(list(self._before_step.values())))
        suffix = step.suffix
        tags = [f"update_ratio/total{suffix}", f"learning_rate_effect/effective{suffix}"]
        tags += [f"update_ratio/{self._names[id(parameter)]}" for parameter in moved]
        values = [total[None], (change / gradient)[None], changes / sizes]
        last = [self._last_gradients.get(parameter) for parameter in moved]
        known = [each for each in last if each is not None]
        if len(known) == len(moved):
            tags.append(f"learning_rate_effect/gradient_cosine{suffix}")
            values.append(cosine(known, gradients)[None])
        rates = [float(group["lr"]) for group in step.optimizer.param_groups]
        places = [""] if len(rates) == 1 else [f"/{group}" for group in range(len(rates))]
        tags += [f"learning_rate/{step.name}{place}" for place in places]
        values.append(torch.tensor(rates, dtype=torch.float64))
        device = gradient.device
        self._writer.add(step.step, tags, torch.cat([value.to(device, torch.float64) for value in values]))
        if self._replays:
            squares = [
                float(group["lr"]) * total_norm(norms(present)) ** 2
                for group in step.optimizer.param_groups
                if (present := [each.grad for each in group["params"] if each.grad is not None])
            ]
            self._promise, self._promised_at = torch.stack(squares).sum(), step.step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach(trainer)

    def _detach(self, trainer: Trainer) -> None:
        if self._steps:
            self._steps.detach()
            self._steps = None
            self._replays = False
        close_step_writer(trainer)
