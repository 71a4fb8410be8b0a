"""What the learning rate does: how far each step goes, whether it turns back, and what it buys."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from downslope.gradients.norms import norms, part_norms, total_norm
from downslope.gradients.steps import cosine, descent_ratio, effective_learning_rate, update_ratio
from downslope.gradients.vectors import flat, num_elements
from downslope.logs.tensorboard import MANY, Measurement, step_writer
from downslope.steps.due import check_count, is_due
from downslope.steps.loss import BatchLoss, Loss, check_loss, said_off, why_no_loss_of_a_step
from downslope.steps.observer import Observer, say_off
from downslope.steps.optimizer_steps import OptimizerStep, ParameterNames

DESCENT_RATIO = Measurement(
    ["learning_rate_effect/descent_ratio"], lambda *parts: descent_ratio(*(part.double() for part in parts))[:, None]
)
SAME_LOSS = 1e-2  # relative: of autocast's rounding, and of nothing else


class LearningRateEffects(Observer):
    """Logs the learning rate and its effect at every optimizer step, with or without a scheduler, in both modes.

    At step t, from θₜ to θₜ₊₁ along the gradient g that was applied (after clipping):

    - `learning_rate/<optimizer>`: η, the nominal rate; `…/<group>` where there are several parameter groups.
    - `update_ratio/total`, `update_ratio/<parameter>`: ‖θₜ₊₁ − θₜ‖ / ‖θₜ‖.
    - `learning_rate_effect/effective`: ‖θₜ₊₁ − θₜ‖ / ‖g‖. It is η for plain SGD, and is not for Adam.
    - `learning_rate_effect/gradient_cosine`: of g and the gradient of the step before: +1 creeping, −1 bouncing.
    - `learning_rate_effect/descent_ratio`: what the step changed the loss by, on the same batches under the same
      random numbers, over the −η‖g‖² that the gradient promised: 1 small step, ½ the best one, below 0 uphill. It
      costs two more forwards a batch, on copies. It needs the module's `loss(batch)`, or `loss`; where it cannot be
      had, the log says once why.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        num_first_steps: So many steps at the beginning are all measured, less the descent ratio.
        descent_ratio_every_n_steps: The same for the descent ratio, which is more expensive; a multiple of
            `every_n_steps`, None for never.
        loss: As for `downslope.steps.loss.BatchLoss`.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        descent_ratio_every_n_steps: int | None = 50,
        loss: Loss | None = None,
        num_first_steps: int = 100,
    ) -> None:
        check_loss(loss)
        check_count("every_n_steps", every_n_steps)
        if descent_ratio_every_n_steps is not None:
            check_count("descent_ratio_every_n_steps", descent_ratio_every_n_steps)
        check_count("num_first_steps", num_first_steps, least=0)
        self.every_n_steps = every_n_steps
        self.num_first_steps = num_first_steps
        self.descent_ratio_every_n_steps = descent_ratio_every_n_steps
        self.loss = loss
        self.reset()

    def reset(self) -> None:
        self._last: dict[str, tuple[list[str], Tensor, Tensor]] = {}  # by optimizer its last gradient: whose, g, ‖g‖²

    def state_dict(self) -> dict[str, Any]:
        return {
            optimizer: {"parameters": names, "gradient": gradient.cpu()}
            for optimizer, (names, gradient, _) in self._last.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last = {
            optimizer: (last["parameters"], last["gradient"], torch.dot(last["gradient"], last["gradient"]))
            for optimizer, last in state_dict.items()
        }

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self.listen_only()
        self._writer = step_writer(trainer)
        if not self._writer.is_open:
            return
        self._names = ParameterNames(module)
        self._last = move_data_to_device(self._last, module.device)
        self._plans: dict[object, tuple[Measurement, list[int]]] = {}
        self._window: list[BatchLoss] = []
        self._returned: list[Tensor] = []
        self._is_compared = False
        self._before_step: Tensor | None = None
        self._taken: Taken | None = None
        self._is_watched = False
        due = partial(is_due, every_n_steps=self.every_n_steps, num_first=self.num_first_steps)
        self._steps = self.follow(trainer, self._before, self._after, due)
        self.follow(trainer, None, self._keep_gradient, lambda count: due(count + 1))
        self._has_loss = self.descent_ratio_every_n_steps is not None and not said_off(
            trainer, DESCENT_RATIO.tags[0], why_no_loss_of_a_step(trainer, module, self.loss, one_batch=False)
        )
        if self._has_loss:
            self._steps.on_next = self.guarded(self._sleep_till_due)
            self._sleep_till_due()

    def detach(self) -> None:
        self._writer.flush()

    def _leave_out_descent_ratio(self, error: Exception) -> None:
        self._has_loss = self._is_watched = False
        self._window.clear()
        say_off("learning_rate_effect/descent_ratio", error)

    def _sleep_till_due(self) -> None:
        every = self.descent_ratio_every_n_steps or 1
        due = self._steps.are_due() and any(is_due(state.count, every) for state in self._steps.states)
        self.listen("on_train_batch_start", when=self._has_loss and due)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._window:
            self._window_began_at = trainer.global_step
        try:
            self._window.append(BatchLoss(pl_module, batch, self.loss, batch_idx))
        except Exception as error:  # such as a batch that cannot be copied: the other figures are written all the same
            self._leave_out_descent_ratio(error)
        self._is_watched = self._has_loss
        self.listen("on_train_batch_end", when=self._is_watched)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        returned = outputs.get("loss") if isinstance(outputs, dict) else None
        self._returned += [returned] if isinstance(returned, Tensor) else []
        skipped = trainer.global_step != self._window_began_at  # by a GradScaler, which calls no optimizer
        taken, self._taken, self._is_watched = self._taken, None, False
        if taken:
            try:
                self._write_descent_ratio(trainer, pl_module, taken)
            except Exception as error:
                self._leave_out_descent_ratio(error)
        if taken or skipped:
            self._window.clear()
            self._returned.clear()
        self.listen("on_train_batch_end", when=False)
        self._sleep_till_due()

    def _write_descent_ratio(self, trainer: Trainer, module: LightningModule, taken: "Taken") -> None:
        """The gradient was that of the batches' losses added up, each divided by the length of a full window."""
        if not module.automatic_optimization and len(self._window) > 1:
            raise ValueError("under manual optimization it is not known how the losses of several batches were added")
        before = after = torch.zeros(())
        for loss in self._window:
            start, change = (loss.pieces(taken.parameters, vector) for vector in (taken.before, taken.change))
            with loss.measuring():
                along = loss.along(start, change)
                before, after = before + along(0.0), after + along(1.0)
        num_batches = trainer.accumulate_grad_batches
        if module.automatic_optimization and not self._is_compared:
            self._is_compared = True  # once: is it the loss whose gradient was taken?
            computed, returned = float(before) / num_batches, float(sum(self._returned))
            if not math.isclose(computed, returned, rel_tol=SAME_LOSS) and math.isfinite(returned):
                raise ValueError(f"the loss is {computed:.6g} where `training_step` returned {returned:.6g}")
        self._writer.add(taken.step, DESCENT_RATIO, before / num_batches, after / num_batches, taken.promise)

    def _before(self, step: OptimizerStep) -> None:
        self._before_step = flat(step.parameters)

    def _keep_gradient(self, step: OptimizerStep) -> None:
        """For the cosine of the next one."""
        if step.moved:
            self._last[step.name] = self._names.of(step.moved), step.flat_gradient, step.gradient_square

    def _after(self, step: OptimizerStep) -> None:
        before, self._before_step = self._before_step, None
        if not step.moved or before is None:
            return
        names, gradient, square = self._names.of(step.moved), step.flat_gradient, step.gradient_square
        known, last, last_square = self._last.pop(step.name, (None, gradient, square))
        has_cosine, groups = known == names, step.optimizer.param_groups
        products = [torch.dot(gradient, last), last_square] if has_cosine else []
        del last  # of a large model there is no room for what is done with
        key = (step.name, has_cosine, len(groups), *names)
        if key not in self._plans:
            self._plans[key] = self._plan(step, names, has_cosine)
        rates = [math.nan if group.get("lr") is None else float(group["lr"]) for group in groups]
        measurement, many = self._plans[key]
        own = norms(before.split(many)) if many else before
        change = self._change(before, step.parameters, many)
        change_norms = norms(change.split(many)) if many else change
        self._writer.add(step.step, measurement, rates, own, change_norms, square, *products)
        if self._is_watched and any(map(math.isnan, rates)):
            self._leave_out_descent_ratio(ValueError("a parameter group has no learning rate"))
        elif self._is_watched:
            self._taken = Taken(step.step, step.parameters, before, change, _promise(step))

    def _change(self, before: Tensor, parameters: Sequence[Tensor], many: Sequence[int]) -> Tensor:
        """θₜ₊₁ − θₜ; of many elements, where only norms are asked for, θₜ − θₜ₊₁ in the memory of θₜ: one copy less."""
        is_plain = all(each.layout == torch.strided and each.dtype == before.dtype for each in parameters)
        if not many or self._is_watched or before.is_complex() or not is_plain:
            return flat(parameters).sub_(before)
        pairs = zip(before.split(many), parameters, strict=True)
        torch._foreach_sub_([part.view_as(each) for part, each in pairs], [*parameters])
        return before

    def _plan(self, step: OptimizerStep, names: list[str], has_cosine: bool) -> tuple[Measurement, list[int]]:
        """What is measured, and how many elements each parameter has if norms are to be taken at once: of many."""
        suffix, sizes = step.suffix, [num_elements(each) for each in step.parameters]
        is_long = sum(sizes) > MANY
        moved = {*map(id, step.moved)}
        shown = torch.tensor([index for index, each in enumerate(step.parameters) if id(each) in moved])
        shown = shown.to(step.moved[0].device)
        groups = range(len(step.optimizer.param_groups))
        places = [""] if len(groups) == 1 else [f"/{group}" for group in groups]
        tags = [f"update_ratio/total{suffix}", f"learning_rate_effect/effective{suffix}"]
        tags += [f"update_ratio/{name}" for name in names]
        tags += [f"learning_rate/{step.name}{place}" for place in places]
        tags += [f"learning_rate_effect/gradient_cosine{suffix}"] * has_cosine

        def derive(rates: Tensor, before: Tensor, change: Tensor, square: Tensor, *products: Tensor) -> Tensor:
            own, changes = (each if is_long else part_norms(each, sizes) for each in (before, change))
            total, length = total_norm(changes), square.sqrt()
            columns = [
                update_ratio(total, total_norm(own))[:, None],
                effective_learning_rate(total, length)[:, None],
                update_ratio(changes, own)[:, shown],
                rates.to(changes.device, torch.promote_types(changes.dtype, torch.float32), non_blocking=True),
            ]
            if has_cosine:
                columns.append(cosine(products[0], length, products[1].sqrt())[:, None])
            return torch.cat(columns, dim=1)

        return Measurement(tags, derive), sizes if is_long else []


class Taken(NamedTuple):
    """A step whose descent ratio is measured when its batch has ended, and what the gradient promised: Σ η‖g‖²."""

    step: int
    parameters: Sequence[Tensor]
    before: Tensor
    change: Tensor
    promise: Tensor


def _promise(step: OptimizerStep) -> Tensor:
    """Σ η‖g‖², over the parameter groups."""
    groups = step.optimizer.param_groups
    if len(groups) == 1:
        return float(groups[0]["lr"]) * step.gradient_square
    rates = [float(group["lr"]) for group in groups for each in group["params"] if each.grad is not None]
    squares = norms(step.gradients).square()
    return squares @ squares.new_tensor(rates)
