"""What arrives at each optimizer step: gradient norms before and after clipping, gradients, parameters."""

from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from itertools import accumulate, chain, product
from math import inf
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from downslope.gradients.norms import norms, part_norms, total_norm
from downslope.gradients.vectors import flat, num_elements
from downslope.logs.tensorboard import MANY, Measurement, step_writer
from downslope.steps.due import check_count, is_due
from downslope.steps.observer import Observer
from downslope.steps.optimizer_steps import OptimizerStep, ParameterNames
from downslope.steps.unclipped_gradients import UnclippedGradients

SMALL_MODEL = 64  # elements


class GradientMonitor(Observer):
    """Logs the gradient of every optimizer step: what arrives at it, and what is left of that after clipping.

    At step t (t optimizer steps taken before it) it writes `gradient_norm/total` and `gradient_norm/<parameter>`, of
    the gradient that arrives: accumulated, unscaled, all-reduced, **before clipping**; `gradient_norm/applied`, **after
    clipping**, what the optimizer consumed; the histogram `gradient/<parameter>`, and element by element
    `gradient_value/<parameter>[i,j]` and `parameter_value/<parameter>[i,j]`, the latter of θₜ. Of several optimizers
    each step shows the parameters of the one that takes it, and the tags without a parameter end in its name.

    A parameter that has no gradient is passed over. A step that a GradScaler skips is none.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        num_first_steps: So many steps at the beginning are all measured: what goes wrong goes wrong early.
        histogram_every_n_steps: The same for histograms, which are more expensive; a multiple of `every_n_steps`.
        parameters: Names, with * and ?, of those that get tags of their own; the total is always that of all.
        norm_type: 2, or infinity for the largest element; of complex ones both parts are elements.
        max_scalar_elements: Parameters of at most so many elements are also written element by element, where the
            optimizer holds at most 64 in all: of a larger model nobody looks at each.

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
        num_first_steps: int = 100,
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        check_count("histogram_every_n_steps", histogram_every_n_steps)
        check_count("num_first_steps", num_first_steps, least=0)
        if norm_type not in (2, inf):
            raise ValueError(f"`norm_type` must be 2 or inf, got {norm_type!r}.")
        self.every_n_steps = every_n_steps
        self.num_first_steps = num_first_steps
        self.histogram_every_n_steps = histogram_every_n_steps
        self.parameters = parameters
        self.norm_type = float(norm_type)
        self.max_scalar_elements = max_scalar_elements

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._writer = step_writer(trainer)
        self.listen_only()
        if not self._writer.is_open:
            return
        self._names = ParameterNames(module)
        self._plans: dict[object, tuple[Measurement, dict[str, int], bool]] = {}
        self._held: list[Parameter] = []
        self._small: list[Parameter] = []
        due = partial(is_due, every_n_steps=self.every_n_steps, num_first=self.num_first_steps)
        steps = self.follow(trainer, self._before, self._after, due)
        self._unclipped = unclipped = UnclippedGradients(trainer, module, steps, self.guarded)
        if unclipped.are_applied:
            return
        is_automatic = module.automatic_optimization
        self.listen("on_after_backward", when=not is_automatic and trainer.world_size > 1)

        def prepare() -> None:
            self.listen("on_before_optimizer_step" if is_automatic else "on_train_batch_start", when=steps.are_due())
            unclipped.watch()

        steps.on_next = self.guarded(prepare)
        prepare()

    def detach(self) -> None:
        if hasattr(self, "_unclipped"):
            self._unclipped.detach()
        self._writer.flush()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._unclipped.watch()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unclipped.on_after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._unclipped.on_before_optimizer_step(optimizer)

    def _before(self, step: OptimizerStep) -> None:
        if step.parameters is not self._held:
            self._held = step.parameters
            most = self.max_scalar_elements if sum(map(num_elements, self._held)) <= SMALL_MODEL else 0
            self._small = [each for each in self._held if 0 < each.numel() <= most]
        self._values = flat(self._small)

    def _after(self, step: OptimizerStep) -> None:
        unclipped = {} if self._unclipped.are_applied else self._unclipped.take(step)
        parameters: tuple[Tensor, ...] = step.moved if self._unclipped.are_applied else tuple(unclipped)
        if not parameters:
            return
        arrived = [*unclipped.values()] or step.gradients
        applied = [[each.grad for each in unclipped if each.grad is not None]] if unclipped else []
        key = (step.name, len(self._small), *map(id, parameters))  # a parameter's hash takes longer
        if key not in self._plans:
            self._plans[key] = self._plan(parameters, step.suffix)
        measurement, histograms, is_long = self._plans[key]
        if is_long:
            is_known = not unclipped and self.norm_type == 2
            taken = [step.gradient_norms if is_known else norms(each, self.norm_type) for each in (arrived, *applied)]
        else:
            taken = [flat(arrived) if unclipped else step.flat_gradient, *map(flat, applied)]
        self._writer.add(step.step, measurement, self._values, *taken)
        if is_due(step.count, self.histogram_every_n_steps):
            self._writer.add_histograms(step.step, {tag: arrived[place] for tag, place in histograms.items()})

    def _plan(self, parameters: tuple[Tensor, ...], suffix: str) -> tuple[Measurement, dict[str, int], bool]:
        """What is measured of a set of parameters, which of them get which histogram, and whether they are many.

        Many are worked on at once anyhow: then norms are taken in place, and nothing is copied.
        """
        names, sizes = self._names.of(parameters), [num_elements(each) for each in parameters]
        shown = [index for index, name in enumerate(names) if fnmatch(name, self.parameters)]
        kept = {id(each) for each in self._small}
        small = [parameters[index] for index in shown if id(parameters[index]) in kept]
        tags = [f"gradient_norm/total{suffix}", f"gradient_norm/applied{suffix}"]
        tags += [f"gradient_norm/{names[index]}" for index in shown]
        for kind in ("gradient_value", "parameter_value"):
            tags += [f"{kind}/{self._names.of([each])[0]}{place}" for each in small for place in _places(each)]
        device = parameters[0].device
        of_gradients, of_values = (_columns(small, each).to(device) for each in (parameters, self._small))
        is_shown, is_long = torch.tensor(shown, dtype=torch.long, device=device), sum(sizes) > MANY

        def derive(values: Tensor, *taken: Tensor) -> Tensor:
            each = taken if is_long else [part_norms(vectors, sizes, self.norm_type) for vectors in taken]
            totals = [total_norm(of_parts, self.norm_type)[:, None] for of_parts in each]
            elements = [taken[0][:, of_gradients], values[:, of_values]] if small else []
            return torch.cat([totals[0], totals[-1], each[0][:, is_shown], *elements], dim=1)

        return Measurement(tags, derive), {f"gradient/{names[index]}": index for index in shown}, is_long


def _columns(chosen: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Where the elements of some parameters stand in a vector of them all."""
    wanted, starts = {id(each) for each in chosen}, accumulate(map(num_elements, parameters), initial=0)
    ranges = [
        range(at, at + num_elements(each)) for at, each in zip(starts, parameters, strict=False) if id(each) in wanted
    ]
    return torch.tensor(list(chain.from_iterable(ranges)), dtype=torch.long)


def _places(tensor: Tensor) -> list[str]:
    """The indices of each element, [0,3]; of a scalar []; of a complex one, those of both its parts."""
    places = [f"[{','.join(map(str, index))}]" for index in product(*map(range, tensor.shape))]
    return [f"{place}.{part}" for place in places for part in ("real", "imag")] if tensor.is_complex() else places
