"""What a step looked like: its loss, and how long each gradient and each parameter was."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from downslope.gradients.finiteness import RowNorms, wide_norms
from downslope.steps.optimizer_steps import OptimizerStep, ParameterNames
from downslope.verdict.flight_record import StepRecord

Norms = Tensor | list[float]  # a tensor until they have been read from the device


@dataclass(slots=True, eq=False)
class MeasuredStep:
    """A step, or a batch without one: raw, because most are never looked at but for their sum.

    Attributes:
        norms: Of gradients as they arrived, then of the parameters that moved, then of gradients as they were applied,
            where those may be others.
        looked_twice: Gradients were looked at as they arrived, before anybody could mend them.
    """

    step: int
    epoch: int
    batch_index: int
    batch: Any = None
    loss: Tensor | float | None = None
    optimizer: str | None = None
    learning_rate: float | list[float] | None = None
    gradient_names: Sequence[str] = ()
    parameter_names: Sequence[str] = ()
    norms: Norms = field(default_factory=list)
    looked_twice: bool = False

    def is_finite(self) -> bool:
        """Tells whether all that was read is finite."""
        return isfinite((self.loss or 0.0) + sum(self.norms))

    def was_mended(self) -> bool:
        """Tells whether gradients arrived that were not finite, and what was applied was, and what came of it."""
        start = len(self.gradient_names)
        return self.looked_twice and not isfinite(sum(self.norms[:start])) and isfinite(sum(self.norms[start:]))

    def size(self) -> float:
        """Returns the norm of all parameters that moved, as one vector."""
        start = len(self.gradient_names)
        return sqrt(sum(norm * norm for norm in self.norms[start : start + len(self.parameter_names)]))

    def record(self) -> StepRecord:
        """Returns what was read, by name."""
        values = iter(self.norms)
        arrived = dict(zip(self.gradient_names, islice(values, len(self.gradient_names)), strict=True))
        parameters = dict(zip(self.parameter_names, values, strict=False))
        stepped = parameters or arrived  # not those of another optimizer
        gradients = {name: norm for name, norm in arrived.items() if name in stepped}
        figures = (self.optimizer, self.learning_rate, self.loss, gradients, parameters)
        return StepRecord(self.step, self.epoch, self.batch_index, *figures)  # type: ignore[arg-type]


def read(measured: Sequence[MeasuredStep]) -> None:
    """Turns what is still on the device into numbers, all in one transfer."""
    losses = [each for each in measured if isinstance(each.loss, Tensor)]
    waiting = [each for each in measured if isinstance(each.norms, Tensor)]
    if not waiting and len(losses) == 1:  # on a CPU
        losses[0].loss = losses[0].loss.item()  # type: ignore[union-attr]
        return
    tensors = [each.loss for each in losses] + [each.norms for each in waiting]
    values = iter(torch.cat([each.reshape(-1).double() for each in tensors]).tolist() if tensors else [])  # type: ignore[union-attr]
    for each in losses:
        each.loss = next(values)
    for each in waiting:
        each.norms = list(islice(values, len(each.norms)))


class StepNorms:
    """Takes the norms of steps, but for parameters that were not finite when training began: no step broke those.

    Args:
        names: Of the parameters.
        optimizers: Whose steps are measured.
    """

    def __init__(self, names: ParameterNames, optimizers: Iterable[Optimizer]) -> None:
        self._names = names
        self._layouts: dict[str, _Layout] = {}
        held = [each for optimizer in optimizers for each in _held(optimizer)]
        finite = wide_norms(held).isfinite().tolist() if held else []
        self._left_out = {id(each) for each, is_finite in zip(held, finite, strict=True) if not is_finite}

    def of_gradients(self, optimizers: Iterable[Optimizer]) -> tuple[list[str], Norms]:
        """Returns the names of the parameters that have a gradient, and the gradients' norms."""
        held = [each for optimizer in optimizers for each in _held(optimizer)]
        present = [each for each in held if each.grad is not None and id(each) not in self._left_out]
        return self._names.of(present), _norms([each.grad for each in present if each.grad is not None])

    def measure(self, step: OptimizerStep, measured: MeasuredStep, arrived: tuple[list[str], Norms] | None) -> None:
        """Looks at what moved after the step, and at the gradients where nobody looked as they arrived."""
        layout = self._layouts.get(step.name)
        if layout is None or layout.moved is not step.moved:
            layout = self._layouts[step.name] = _Layout(step, self._names, self._left_out)
        gradients, parameters = layout.chosen(step.gradients), layout.parameters
        measured.gradient_names = measured.parameter_names = layout.names
        if not arrived:
            measured.norms = layout.norms.of([*gradients, *parameters])
            return
        measured.gradient_names, norms = arrived
        measured.looked_twice = True
        is_good = isinstance(norms, list) and isfinite(sum(norms))  # nobody makes it worse
        measured.norms = _joined(norms, _norms(parameters if is_good else [*parameters, *gradients]))


class _Layout:
    """What an optimizer's steps move, as long as it is the same."""

    def __init__(self, step: OptimizerStep, names: ParameterNames, left_out: set[int]) -> None:
        self.moved = step.moved
        self._places = [place for place, each in enumerate(step.moved) if id(each) not in left_out]
        self.parameters = self.chosen(step.moved)
        self.names = names.of(self.parameters)
        self.norms = RowNorms([*self.chosen(step.gradients), *self.parameters])

    def chosen(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if len(tensors) == len(self._places) else [tensors[place] for place in self._places]


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _norms(tensors: Sequence[Tensor]) -> Norms:
    """The norms of tensors, on a CPU as numbers at once: there nothing has to be waited for."""
    norms = wide_norms(tensors)
    return norms.tolist() if norms.device.type == "cpu" else norms


def _joined(first: Norms, second: Norms) -> Norms:
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    place = next(each for each in (first, second) if isinstance(each, Tensor))
    return torch.cat([torch.as_tensor(each).to(place) for each in (first, second)])
