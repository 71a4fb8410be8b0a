"""A way back: tensors and optimizer states as they were, to the last bit."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
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


class Snapshot(Copies):
    """A copy of parameters and optimizer states: frozen parameters, which no optimizer holds, stay as they are anyway.

    Args:
        optimizers: Whose parameters and states are copied, in as much memory again.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        super().__init__()
        self._optimizers = optimizers
        self._states: list[dict[Any, Any]] = []

    def take_all(self) -> None:
        """Remembers how everything is now."""
        tensors: list[Tensor] = [*held(self._optimizers)]
        self._states = [
            {parameter: _outline(state, tensors) for parameter, state in optimizer.state.items()}
            for optimizer in self._optimizers
        ]
        self.take(tensors)

    def restore(self) -> None:
        """Makes everything as it was at the last `take_all`."""
        super().restore()
        for optimizer, states in zip(self._optimizers, self._states, strict=False):
            optimizer.state.clear()
            for parameter, state in states.items():
                optimizer.state[parameter] = _outline(state, [])  # the outline itself stays whole for another time


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    """The containers of a state copied, its tensors not: these are added to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, dict):
        return {key: _outline(each, tensors) for key, each in value.items()}
    elif isinstance(value, list):
        return [_outline(each, tensors) for each in value]
    return value
