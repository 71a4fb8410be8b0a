"""A way back: tensors and optimizer states as they were, to the last bit."""

from collections import defaultdict
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Pairs = list[tuple[list[Tensor], list[Tensor]]]


class Snapshot:
    """A copy of parameters and optimizer states, renewed in place by a few fused calls.

    It costs as much memory as what it copies. Only parameters that an optimizer holds are copied: frozen ones stay as
    they are by themselves.

    Args:
        optimizers: Whose parameters and states are copied.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._states: list[dict[Any, Any]] = []
        self._copies = Copies()

    def take(self) -> None:
        """Remembers how everything is now, without autograd."""
        tensors: list[Tensor] = []
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                tensors += group["params"]
        self._states = [
            {parameter: _outline(state, tensors) for parameter, state in optimizer.state.items()}
            for optimizer in self._optimizers
        ]
        self._copies.take(tensors)

    def restore(self) -> None:
        """Makes everything as it was at the last `take`."""
        self._copies.restore()
        for optimizer, states in zip(self._optimizers, self._states, strict=True):
            optimizer.state.clear()
            for parameter, state in states.items():
                optimizer.state[parameter] = _outline(state, [])  # the outline itself stays whole for another time


class Copies:
    """Copies of tensors, in memory that is kept from one time to the next while the tensors are the same."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._pairs: Pairs = []

    def take(self, tensors: list[Tensor]) -> None:
        """Copies the tensors as they are now, without autograd."""
        if len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors)):
            self._tensors, self._pairs = tensors, _pairs(tensors)
        for originals, copies in self._pairs:
            torch._foreach_copy_(copies, originals)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copies' values back into the tensors."""
        for originals, copies in self._pairs:
            torch._foreach_copy_(originals, copies)


def _pairs(tensors: list[Tensor]) -> Pairs:
    """Tensors and memory for their copies, by device and type: only tensors of one kind are copied in one call."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.device, tensor.dtype].append(tensor)
    return [(originals, [torch.empty_like(tensor) for tensor in originals]) for originals in kinds.values()]


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    """The containers of a state copied, its tensors not: these are added to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, dict):
        return {key: _outline(each, tensors) for key, each in value.items()}
    elif isinstance(value, list):
        return [_outline(each, tensors) for each in value]
    return value
