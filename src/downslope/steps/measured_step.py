"""What a step looked like: its loss, and how long each gradient and each parameter was."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from downslope.gradients.finiteness import RowNorms, norms_now, wide_norms
from downslope.steps.optimizer_steps import OptimizerStep, ParameterNames, held
from downslope.verdict.flight_record import StepRecord


@dataclass(slots=True, eq=False)
class Norms:
    """Of some tensors, each with its name: on a CPU numbers, elsewhere a tensor until somebody reads it."""

    names: Sequence[str] = ()
    values: Tensor | Sequence[float] = ()


@dataclass(slots=True, eq=False)
class MeasuredStep:
    """A step, or a batch without one: raw, because most are never looked at but for their sum.

    Attributes:
        arrived: Of gradients before anybody could mend them; None where nobody looked.
        applied: Of gradients as the step consumed them, where those may be others.
        parameters: Of those that moved, after the step.
    """

    step: int
    epoch: int
    batch_index: int
    batch: Any = None
    loss: Tensor | float | None = None
    optimizer: str | None = None
    learning_rate: float | list[float] | None = None
    arrived: Norms | None = None
    applied: Norms = field(default_factory=Norms)
    parameters: Norms = field(default_factory=Norms)
    _is_sent: torch.cuda.Event | None = None

    def _norms(self) -> list[Norms]:
        return [each for each in (self.arrived, self.applied, self.parameters) if each]

    def send(self) -> None:
        """Lets all travel from a GPU to the host, where nobody waits for it."""
        if isinstance(self.loss, Tensor):
            self.loss = self.loss.to("cpu", non_blocking=self.loss.is_cuda)
        for each in self._norms():
            if isinstance(each.values, Tensor) and each.values.is_cuda:
                each.values = each.values.to("cpu", non_blocking=True)
                self._is_sent = torch.cuda.Event()
                self._is_sent.record()

    def read(self) -> None:
        """Turns what is still a tensor into numbers."""
        if self._is_sent:
            self._is_sent.synchronize()
        if isinstance(self.loss, Tensor):
            self.loss = self.loss.item()
        for each in self._norms():
            if isinstance(each.values, Tensor):
                each.values = each.values.tolist()

    def is_finite(self) -> bool:
        """Tells whether all that was read is finite."""
        return isfinite((self.loss or 0.0) + sum([sum(each.values) for each in self._norms()]))

    def was_mended(self) -> bool:
        """Tells whether gradients arrived that were not finite, and what was applied was, and what came of it."""
        if not self.arrived or not self.optimizer or isfinite(sum(self.arrived.values)):
            return False
        return isfinite(sum(self.applied.values) + sum(self.parameters.values))

    def size(self) -> float:
        """Returns the norm of all parameters that moved, as one vector."""
        return sqrt(sum([norm * norm for norm in self.parameters.values]))

    def record(self) -> StepRecord:
        """Returns what was read, by name."""
        gradients, parameters = self.arrived or self.applied, self.parameters
        stepped = set(parameters.names or gradients.names)  # not those of another optimizer
        return StepRecord(
            self.step,
            self.epoch,
            self.batch_index,
            self.optimizer,
            self.learning_rate,
            self.loss,  # type: ignore[arg-type]
            {name: norm for name, norm in zip(gradients.names, gradients.values, strict=True) if name in stepped},
            dict(zip(parameters.names, parameters.values, strict=True)),
        )


class StepNorms:
    """Takes the norms of steps, but for parameters that were not finite when training began: no step broke those.

    Args:
        names: Of the parameters.
        optimizers: Whose steps are measured.
    """

    def __init__(self, names: ParameterNames, optimizers: Iterable[Optimizer]) -> None:
        self._names = names
        self._rows: dict[str, tuple[tuple[Parameter, ...], list[bool], list[str], RowNorms]] = {}  # by optimizer
        tensors = held(optimizers)
        self._left_out = {
            id(each) for each, norm in zip(tensors, wide_norms(tensors).tolist(), strict=True) if not isfinite(norm)
        }

    def of_gradients(self, optimizers: Iterable[Optimizer]) -> Norms:
        """Returns the norms of the gradients that are there."""
        present = [each for each in held(optimizers) if each.grad is not None and id(each) not in self._left_out]
        return Norms(self._names.of(present), norms_now([each.grad for each in present if each.grad is not None]))

    def measure(self, step: OptimizerStep, measured: MeasuredStep, parameters: bool = True) -> None:
        """Looks after the step at the gradients that were applied, and at what moved if that is asked for."""
        row = self._rows.get(step.name)
        if row is None or row[0] is not step.moved:
            kept = [id(each) not in self._left_out for each in step.moved]
            names = self._names.of(compress(step.moved, kept))
            row = self._rows[step.name] = step.moved, kept, names, RowNorms(_both(step, kept))
        _, kept, names, norms = row
        if parameters:
            values = norms.of(_both(step, kept))
            measured.applied, measured.parameters = (
                Norms(names, values[: len(names)]),
                Norms(names, values[len(names) :]),
            )
        else:
            values = step.gradient_norms
            measured.applied = Norms(names, values if all(kept) else values[torch.tensor(kept, device=values.device)])

    def look_again(self, measured: MeasuredStep) -> None:
        """Looks at what moved in a step, as it is now, where it was not asked for then."""
        if measured.optimizer and not measured.parameters.names:
            moved, kept, names, _ = self._rows[measured.optimizer]
            measured.parameters = Norms(names, norms_now([*compress(moved, kept)]))


def _both(step: OptimizerStep, kept: list[bool]) -> list[Tensor]:
    """The gradients, and after them the parameters."""
    return [*compress(step.gradients, kept), *compress(step.moved, kept)]
