"""A way back: tensors and optimizer states as they were, to the last bit."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from downslope.gradients.vectors import copy
from downslope.steps.optimizer_steps import are_same, held


class Copies:
    """Copies of tensors, in memory that is kept from one time to the next while the tensors are the same."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    def take(self, tensors: list[Tensor]) -> None:
        """Copies the tensors as they are now, to be called where autograd does not record."""
        if not are_same(tensors, self._tensors):
            kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for tensor in tensors:
                kinds[tensor.device, tensor.dtype].append(tensor)
            self._tensors = tensors
            self._pairs = [(each, [torch.empty_like(tensor) for tensor in each]) for each in kinds.values()]
        for originals, copies in self._pairs:
            copy(copies, originals)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copies' values back into the tensors."""
        for originals, copies in self._pairs:
            copy(originals, copies)


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
FEW = 2**16  # elements: larger tensors are worked on alone, in four times their memory


def fingerprint(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns numbers that tell whether any bit is another: Σᵢ bᵢ(bᵢ + 2i + 1), the bits bᵢ taken as whole numbers.

    It neither copies a large tensor nor waits for the device. By chance it misses one change in 2³² or so.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    large = []
    for each in tensors:
        vector = each.detach().reshape(-1)
        kinds[each.device, each.dtype].append(vector) if len(vector) <= FEW else large.append(vector)
    return [_sum_of_bits(each) for each in (*map(torch.cat, kinds.values()), *large)]


def _sum_of_bits(vector: Tensor) -> Tensor:
    vector = vector.view(torch.float64) if vector.dtype == torch.complex128 else vector
    bits = vector.view(INTEGERS[vector.element_size()])
    bits = bits if bits.element_size() > 2 else bits.int()
    return (bits * (bits + torch.arange(1, 2 * len(bits) + 1, 2, dtype=bits.dtype, device=bits.device))).sum()


def held_and_states(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Returns all that a step changes: parameters, and the tensors in the states of their optimizers."""
    tensors: list[Tensor] = [*held(optimizers)]
    _outlines(optimizers, tensors)
    return tensors


class Snapshot(Copies):
    """A copy of parameters and optimizer states: frozen parameters, which no optimizer holds, stay as they are anyway.

    Args:
        optimizers: Whose parameters and states are copied, in as much memory again.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        super().__init__()
        self._optimizers = optimizers
        self._parameters: list[Parameter] = []
        self._states: list[dict[Any, Any]] = []
        # Schedule-free and its like keep a state among their settings.
        self._foreign = [each for each in optimizers if not type(each).__module__.startswith("torch.optim.")]
        self._settings: list[dict[str, Any]] = []

    def is_complete(self) -> bool:
        """Tells whether the optimizers hold the parameters that they held at the last `take_all`, and no others."""
        return are_same(held(self._optimizers), self._parameters)

    def take_all(self) -> None:
        """Remembers how everything is now."""
        self._parameters = held(self._optimizers)
        tensors: list[Tensor] = [*self._parameters]
        self._states = _outlines(self._optimizers, tensors)
        self.take(tensors)
        self._settings = [{**group} for optimizer in self._foreign for group in optimizer.param_groups]

    def restore(self) -> None:
        """Makes everything as it was at the last `take_all`."""
        super().restore()
        groups = [group for optimizer in self._foreign for group in optimizer.param_groups]
        for group, settings in zip(groups, self._settings, strict=False):
            group.update(settings)
        for optimizer, states in zip(self._optimizers, self._states, strict=False):
            optimizer.state.clear()
            for parameter, state in states.items():
                optimizer.state[parameter] = _outline(state, [])  # the outline itself stays whole for another time


def _outlines(optimizers: Sequence[Optimizer], tensors: list[Tensor]) -> list[dict[Any, Any]]:
    """The outline of each optimizer's states, by parameter."""
    return [
        {parameter: _outline(state, tensors) for parameter, state in optimizer.state.items()}
        for optimizer in optimizers
    ]


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    """The containers of a state copied, its tensors not: these are added to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, dict):
        return {key: _outline(each, tensors) for key, each in value.items()}
    elif isinstance(value, list):
        return [_outline(each, tensors) for each in value]
    return value
