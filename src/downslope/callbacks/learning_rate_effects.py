"""What the learning rate does: how far each step goes, whether it turns back, and what it buys."""

import logging
from functools import reduce
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter

from downslope.gradients.norms import norms, part_norms, total_norm
from downslope.gradients.steps import cosine, descent_ratio, effective_learning_rate, update_ratio
from downslope.logs.tensorboard import Measurement, close_step_writer, step_writer
from downslope.steps.optimizer_steps import (
    STEP_HOOKS,
    OptimizerStep,
    OptimizerSteps,
    check_frequency,
    flat,
    leave_out_idle_hooks,
    parameter_names,
    wake,
)
from downslope.steps.random_state import RandomState
from downslope.steps.replay import Replay, why_no_replay

log = logging.getLogger(__name__)

DESCENT_RATIO = Measurement(
    ["learning_rate_effect/descent_ratio"], lambda *parts: descent_ratio(*(part.double() for part in parts))[:, None]
)


class LearningRateEffects(Callback):
    """Logs the learning rate and its effect at every optimizer step, with or without a scheduler, in both modes.

    At step t, from θₜ to θₜ₊₁ along the gradient g that was applied (after clipping):

    - `learning_rate/<optimizer>`: η, the nominal rate; `…/<group>` where there are several parameter groups.
    - `update_ratio/total`, `update_ratio/<parameter>`: ‖θₜ₊₁ − θₜ‖ / ‖θₜ‖.
    - `learning_rate_effect/effective`: ‖θₜ₊₁ − θₜ‖ / ‖g‖. It is η for plain SGD, and is not for Adam.
    - `learning_rate_effect/gradient_cosine`: of g and the gradient of the step before: +1 creeping, −1 bouncing.
    - `learning_rate_effect/descent_ratio`: what the step changed the loss by, on the same batches under the same
      random numbers, over the −η‖g‖² that the gradient promised: 1 small step, ½ the best one, below 0 uphill. It
      costs one more forward a batch, which leaves no trace in training. Where it cannot be had, the log says once why.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        descent_ratio_every_n_steps: The same for the descent ratio, which is dearer; a multiple of `every_n_steps`,
            None for never.

    Raises:
        ValueError: A frequency is below 1.
    """

    def __init__(self, every_n_steps: int = 50, descent_ratio_every_n_steps: int | None = 50) -> None:
        check_frequency("every_n_steps", every_n_steps)
        if descent_ratio_every_n_steps is not None:
            check_frequency("descent_ratio_every_n_steps", descent_ratio_every_n_steps)
        self.every_n_steps = every_n_steps
        self.descent_ratio_every_n_steps = descent_ratio_every_n_steps
        self._steps: OptimizerSteps | None = None
        self._replays = False
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        names = getattr(self, "_names", {})
        gradients = getattr(self, "_last_gradient", {})
        return {
            optimizer: {"parameters": [names[id(each)] for each in parameters], "gradient": gradient.cpu()}
            for optimizer, (parameters, gradient, _) in gradients.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        leave_out_idle_hooks(self, *STEP_HOOKS)
        self._writer = step_writer(trainer)
        if not self._writer.is_open:
            return
        self._names = parameter_names(pl_module)
        named = {self._names[id(parameter)]: parameter for parameter in pl_module.parameters()}
        self._last_gradient: dict[str, tuple[tuple[Parameter, ...], Tensor, Tensor]] = {}
        for optimizer, last in self._loaded.items():
            gradient = last["gradient"].to(pl_module.device)
            moved = tuple(named[name] for name in last["parameters"])
            self._last_gradient[optimizer] = (moved, gradient, torch.dot(gradient, gradient))
        self._loaded = {}
        self._plans: dict[object, Measurement] = {}
        self._window: list[tuple[Any, int, RandomState, Tensor]] = []
        self._promise: Tensor | None = None
        self._watched = False
        every = self.every_n_steps
        self._steps = steps = OptimizerSteps(trainer, self._before, self._after, every)
        self._steps_before = OptimizerSteps(trainer, after=self._keep_gradient, every_n_steps=every, ahead=1)
        reason = why_no_replay(trainer, pl_module) if self.descent_ratio_every_n_steps else None
        self._replays = bool(self.descent_ratio_every_n_steps) and reason is None
        if reason:
            log.warning("learning_rate_effect/descent_ratio is off. This is because %s.", reason)
        if self._replays:
            self._replay = Replay(trainer, pl_module)
            steps.on_next = self._sleep_till_due
            self._sleep_till_due()

    def _sleep_till_due(self) -> None:
        if self._steps:
            every = self.descent_ratio_every_n_steps or 1
            due = self._steps.are_due() and any(state.count % every == 0 for state in self._steps.states)
            wake(self, "on_train_batch_start", awake=self._replays and due)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._random_state = RandomState()
        self._watched = True
        wake(self, "on_train_batch_end")
        if not self._window:
            self._window_began_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if not isinstance(loss, Tensor):
            self._replays = False
            log.warning("learning_rate_effect/descent_ratio is off. This is because `training_step` returns no loss.")
        else:
            self._window.append((batch, batch_idx, self._random_state, loss))
            if self._promise is not None:
                self._write_descent_ratio(trainer, self._promise)
        skipped = trainer.global_step != self._window_began_at  # by a GradScaler, which calls no optimizer
        if self._promise is not None or skipped:
            self._window.clear()
            self._promise = None
        self._watched = False
        wake(self, "on_train_batch_end", awake=False)
        self._sleep_till_due()

    def _write_descent_ratio(self, trainer: Trainer, promise: Tensor) -> None:
        """The gradient was that of the batches' losses added up, each divided by the length of a full window."""
        before = reduce(torch.add, [loss for *_, loss in self._window])
        after = reduce(torch.add, [self._replay.loss(*place) for *place, _ in self._window])
        after = after / trainer.accumulate_grad_batches
        self._writer.add(self._promised_at, DESCENT_RATIO, before, after, promise)

    def _before(self, step: OptimizerStep) -> None:
        self._before_step = flat(step.parameters)

    def _keep_gradient(self, step: OptimizerStep) -> None:
        """For the cosine of the next one."""
        if step.moved:
            self._last_gradient[step.name] = (step.moved, step.flat_gradient, step.gradient_square)

    def _after(self, step: OptimizerStep) -> None:
        if not step.moved:
            return
        gradient, square = step.flat_gradient, step.gradient_square
        known, last, last_square = self._last_gradient.get(step.name, (None, gradient, square))
        has_cosine = known == step.moved
        groups = step.optimizer.param_groups
        key = (step.name, has_cosine, len(groups), *map(id, step.moved))  # a parameter's hash takes longer
        if key not in self._plans:
            self._plans[key] = self._plan(step, has_cosine)
        rates = [float(group["lr"]) for group in groups]
        change = flat(step.parameters).sub_(self._before_step)
        products = [torch.dot(gradient, last), last_square] if has_cosine else []
        self._writer.add(step.step, self._plans[key], rates, self._before_step, change, square, *products)
        if self._watched:
            self._promised_at = step.step
            if len(groups) == 1:
                self._promise = rates[0] * square
            else:
                rates = [float(group["lr"]) for group in groups for each in group["params"] if each.grad is not None]
                squares = norms(step.gradients).square()
                self._promise = squares @ squares.new_tensor(rates)

    def _plan(self, step: OptimizerStep, has_cosine: bool) -> Measurement:
        suffix, sizes = step.suffix, [each.numel() for each in step.parameters]
        shown = [index for index, each in enumerate(step.parameters) if any(each is moved for moved in step.moved)]
        groups = range(len(step.optimizer.param_groups))
        places = [""] if len(groups) == 1 else [f"/{group}" for group in groups]
        tags = [f"update_ratio/total{suffix}", f"learning_rate_effect/effective{suffix}"]
        tags += [f"update_ratio/{self._names[id(parameter)]}" for parameter in step.moved]
        tags += [f"learning_rate/{step.name}{place}" for place in places]
        tags += [f"learning_rate_effect/gradient_cosine{suffix}"] * has_cosine

        def derive(rates: Tensor, before: Tensor, change: Tensor, square: Tensor, *products: Tensor) -> Tensor:
            changes, own = part_norms(change, sizes), part_norms(before, sizes)
            total, length = total_norm(changes), square.sqrt()
            columns = [
                update_ratio(total, total_norm(own))[:, None],
                effective_learning_rate(total, length)[:, None],
                update_ratio(changes, own)[:, shown],
                rates.to(changes.device, torch.promote_types(changes.dtype, torch.float32)),
            ]
            if has_cosine:
                columns.append(cosine(products[0], length, products[1].sqrt())[:, None])
            return torch.cat(columns, dim=1)

        return Measurement(tags, derive)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach(trainer)

    def _detach(self, trainer: Trainer) -> None:
        if self._steps:
            self._steps.detach()
            self._steps_before.detach()
            self._steps = None
            self._replays = self._watched = False
        close_step_writer(trainer)
