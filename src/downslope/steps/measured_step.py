"""What a step looked like: its loss, and how long each gradient and each parameter was."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from downslope.gradients.finiteness import wide_norms
from downslope.steps.optimizer_steps import OptimizerStep, flat
from downslope.verdict.flight_record import StepRecord

Norms = Tensor | list[float]  # a tensor until they have been read from the device
TINY = 2**18  # elements of all the steps that are kept: so many stay in a processor's cache
SMALL = 4096  # elements a tensor: smaller ones are measured as one vector, larger ones take longer to copy


@dataclass(slots=True, eq=False)
class MeasuredStep:
    """A step, or a batch without one: raw, because most are never looked at but for their sum.

    Attributes:
        values: The norms of gradients and then of parameters.
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
    values: Norms = field(default_factory=list)
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


def read(measured: Sequence[MeasuredStep]) -> None:
    """Turns what is still on the device into numbers, all in one transfer."""
    waiting = [each for each in measured if isinstance(each.values, Tensor) and not each.sizes]
    losses = [each for each in measured if isinstance(each.loss, Tensor)]
    if not waiting and len(losses) == 1:  # on a CPU
        losses[0].loss = losses[0].loss.item()  # type: ignore[union-attr]
        return
    tensors = [each.loss for each in losses] + [each.values for each in waiting]
    values = iter(torch.cat([tensor.reshape(-1) for tensor in tensors]).tolist() if tensors else [])  # type: ignore[union-attr]
    for each in losses:
        each.loss = next(values)
    for each in waiting:
        each.values = list(islice(values, len(each.values)))


class StepNorms:
    """Takes the norms of steps, in whichever way is quickest for the tensors.

    Args:
        names: Of the parameters.
        num_steps: How many measured steps are kept.
    """

    def __init__(self, names: Mapping[Parameter, str], num_steps: int) -> None:
        self._names = names
        self._num_steps = num_steps
        self._layouts: dict[str, _Layout] = {}

    def of_gradients(self, optimizers: Iterable[Optimizer]) -> tuple[list[str], Norms]:
        """Returns the names of the parameters that have a gradient, and the gradients' norms."""
        held = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
        present = [(self._names.get(each, "?"), each.grad) for each in held if each.grad is not None]
        return [name for name, _ in present], _norms([gradient for _, gradient in present])

    def measure(self, step: OptimizerStep, measured: MeasuredStep, arrived: tuple[list[str], Norms] | None) -> None:
        """Looks at the gradients, unless they were looked at as they arrived, and at the parameters after the step."""
        parameters, layout = step.parameters, self._layouts.get(step.name)
        if layout is None or layout.moved is not step.moved or layout.parameters is not parameters:
            layout = self._layouts[step.name] = _Layout(step, self._names, self._num_steps)
        measured.parameter_names = layout.parameter_names
        if arrived:
            measured.gradient_names, norms = arrived
            measured.values = _joined(norms, _norms(parameters))
            return
        measured.gradient_names = layout.gradient_names
        both = [*step.gradients, *parameters]
        if layout.is_tiny:
            measured.values, measured.sizes = flat(both), layout.sizes
        else:
            measured.values = layout.norms(both) if layout.is_small else _norms(both)


class _Layout:
    """The tensors of an optimizer's steps, as long as they are the same: some gradients, then all parameters."""

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

    def norms(self, tensors: list[Tensor]) -> Norms:
        """Returns the norm of each of many small tensors, as parts of one vector: quicker than one by one."""
        try:
            torch._foreach_copy_(self._parts, tensors)
        except RuntimeError:  # a gradient is sparse that was not before
            return _norms(tensors)
        squares = self._vector.mul_(self._vector).numpy()
        with np.errstate(over="ignore"):
            norms: list[float] = np.sqrt(np.add.reduceat(squares, self._starts)).tolist()
        return norms if isfinite(sum(norms)) else wide_norms(tensors).tolist()


def _norms(tensors: Sequence[Tensor]) -> Norms:
    """The norms of tensors, on a CPU as numbers at once: there nothing has to be waited for."""
    norms = wide_norms(tensors)
    return norms.tolist() if norms.device.type == "cpu" else norms


def _joined(first: Norms, second: Norms) -> Norms:
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    place = next(each for each in (first, second) if isinstance(each, Tensor))
    return torch.cat([torch.as_tensor(each).to(place) for each in (first, second)])
