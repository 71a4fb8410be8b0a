"""What arrives at each optimizer step: gradient norms before and after clipping, gradients, parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from math import inf
from operator import is_

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from downslope.callbacks.optimizer_steps import (
    STEP_HOOKS,
    OptimizerStep,
    OptimizerSteps,
    check_frequency,
    flat,
    leave_out_idle_hooks,
    parameter_names,
    wake,
)
from downslope.callbacks.unclipped_gradients import UnclippedGradients
from downslope.gradients.norms import dense, norms, total_norm
from downslope.tensorboard import Measurement, close_step_writer, step_writer


class GradientMonitor(Callback):
    """Logs the gradient of every optimizer step: what arrives at it, and what is left of that after clipping.

    At step t (t optimizer steps taken before it) it writes `gradient_norm/total` and `gradient_norm/<parameter>`, of
    the gradient that arrives: accumulated, unscaled, all-reduced, **before clipping**; `gradient_norm/applied`, **after
    clipping**, what the optimizer consumed; the histogram `gradient/<parameter>`, and element by element
    `gradient_value/<parameter>[i,j]` and `parameter_value/<parameter>[i,j]`, the latter of θₜ. Of several optimizers
    each step shows the parameters of the one that takes it, and the tags without a parameter end in its name.

    A parameter that has no gradient is passed over. A step that a GradScaler skips is none.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        histogram_every_n_steps: The same for histograms, which are dearer; a multiple of `every_n_steps`.
        parameters: Names, with * and ?, of those that get tags of their own; the total is always that of all.
        norm_type: 2, or infinity for the largest element.
        max_scalar_elements: Parameters of at most so many elements are also written element by element.

    Raises:
        ValueError: A frequency is below 1, or the norm is another one.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        histogram_every_n_steps: int = 100,
        parameters: str = "*",
        norm_type: float = 2.0,
        max_scalar_elements: int = 16,
    ) -> None:
        check_frequency("every_n_steps", every_n_steps)
        check_frequency("histogram_every_n_steps", histogram_every_n_steps)
        if norm_type not in (2, inf):
            raise ValueError(f"`norm_type` must be 2 or inf, got {norm_type!r}.")
        self.every_n_steps = every_n_steps
        self.histogram_every_n_steps = histogram_every_n_steps
        self.parameters = parameters
        self.norm_type = float(norm_type)
        self.max_scalar_elements = max_scalar_elements
        self._steps: OptimizerSteps | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._writer = step_writer(trainer)
        if not self._writer.is_open:
            leave_out_idle_hooks(self, *STEP_HOOKS)
            return
        self._names = parameter_names(pl_module)
        self._plans: dict[str, Plan] = {}
        self._held: list[Parameter] = []
        self._small: list[Parameter] = []
        self._steps = steps = OptimizerSteps(trainer, self._before, self._after, self.every_n_steps)
        self._unclipped = unclipped = UnclippedGradients(trainer, pl_module, steps)
        leave_out_idle_hooks(self, *STEP_HOOKS)
        if unclipped.are_applied:
            return
        if not pl_module.automatic_optimization:
            wake(self, "on_after_backward", awake=trainer.world_size > 1)
            return
        wake(self, "on_before_optimizer_step")
        steps.on_next = lambda: wake(self, "on_before_optimizer_step", awake=steps.are_due())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unclipped.on_after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._unclipped.on_before_optimizer_step(optimizer)

    def _before(self, step: OptimizerStep) -> None:
        if step.parameters is not self._held:
            self._held = step.parameters
            self._small = [each for each in self._held if 0 < each.numel() <= self.max_scalar_elements]
        if self._small:
            self._values = flat(self._small)

    def _after(self, step: OptimizerStep) -> None:
        unclipped = None if self._unclipped.are_applied else self._unclipped.take(step)
        parameters = step.moved if unclipped is None else tuple(unclipped)
        if not parameters:
            return
        plan = self._plans.get(step.name)
        if plan is None or not _are_same(plan.parameters, parameters):
            plan = self._plans[step.name] = self._plan(parameters, step.suffix)
        if unclipped is None:  # nobody clips
            gradients = step.gradients
            taken = step.gradient_norms if self.norm_type == 2 else norms(gradients, self.norm_type)
        else:
            gradients = list(unclipped.values())
            taken = norms([*gradients, *(each.grad for each in parameters if each.grad is not None)], self.norm_type)
        elements = [flat([gradients[index] for index in plan.small]), self._values] if plan.small else []
        self._writer.add(step.step, plan.measurement, taken, *elements)
        if step.count % self.histogram_every_n_steps == 0:
            for index in plan.shown:
                name = self._names[id(parameters[index])]
                self._writer.add_histogram(step.step, f"gradient/{name}", dense(gradients[index]))

    def _plan(self, parameters: tuple[Parameter, ...], suffix: str) -> "Plan":
        names = [self._names[id(parameter)] for parameter in parameters]
        shown = [index for index, name in enumerate(names) if fnmatch(name, self.parameters)]
        kept = {id(each) for each in self._small}
        small = [index for index in shown if id(parameters[index]) in kept]
        tags = [f"gradient_norm/total{suffix}", f"gradient_norm/applied{suffix}"]
        tags += [f"gradient_norm/{names[index]}" for index in shown]
        for kind in ("gradient_value", "parameter_value"):
            tags += [f"{kind}/{names[index]}{place}" for index in small for place in _places(parameters[index])]
        num, chosen = len(parameters), {id(parameters[index]) for index in small}
        columns = torch.tensor([id(each) in chosen for each in self._small for _ in range(each.numel())])

        def derive(taken: Tensor, *elements: Tensor) -> Tensor:
            arrived, applied = taken[:, :num], taken[:, -num:]  # the same where nobody clips
            totals = [total_norm(each, self.norm_type)[:, None] for each in (arrived, applied)]
            gradients, values = elements or (taken[:, :0], taken[:, :0])
            values = values[:, columns.to(values.device)] if elements else values
            return torch.cat([*totals, arrived[:, shown], gradients.to(taken.device), values.to(taken.device)], dim=1)

        return Plan(parameters, Measurement(tags, derive), shown, small)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach(trainer)

    def _detach(self, trainer: Trainer) -> None:
        if self._steps:
            self._steps.detach()
            self._unclipped.detach()
            self._steps = None
        close_step_writer(trainer)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is measured of a set of parameters: which get tags, and which of those element by element."""

    parameters: tuple[Parameter, ...]
    measurement: Measurement
    shown: list[int]
    small: list[int]


def _are_same(first: Sequence[Parameter], second: Sequence[Parameter]) -> bool:
    return first is second or (len(first) == len(second) and all(map(is_, first, second)))


def _places(tensor: Tensor) -> list[str]:
    """The indices of each element, [0,3]; of a scalar []."""
    return [f"[{','.join(map(str, index))}]" for index in product(*map(range, tensor.shape))]
