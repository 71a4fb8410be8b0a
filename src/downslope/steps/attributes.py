"""A module's plain attributes, which are neither parameters nor buffers: kept, compared and put back."""

from collections import deque
from collections.abc import Iterable
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

MEMBERS = frozenset({"_parameters", "_buffers", "_modules"})  # which of them there are, not what they hold
INTERNAL = frozenset(vars(nn.Module())) - MEMBERS - {"training"}  # hooks, mostly
KEPT_BYTES = 64 * 2**20  # of a tensor: a larger one, such as a whole data set, is not copied
KEPT_ELEMENTS = 1000  # of a container, to look into
CONTAINERS = (list, dict, set, deque)
KEPT = (Tensor, *CONTAINERS)
Where = tuple[nn.Module, str, str]  # a part, its place, and the attribute's name
_ABSENT = object()


class Attributes:
    """The attributes of a module and of its parts at this moment, and what lists, dicts, sets and tensors in them hold.

    Objects of other classes are not looked into.

    Args:
        parts: Of the module, as `named_modules` gives them.

    Example:
        >>> module = nn.Module()
        >>> module.losses = [1.0]
        >>> attributes = Attributes(module.named_modules())
        >>> module.losses.append(2.0)
        >>> attributes.put_back(), module.losses
        (['losses'], [1.0])
    """

    def __init__(self, parts: Iterable[tuple[str, nn.Module]]) -> None:
        self._held: list[tuple[str, nn.Module, dict[str, Any]]] = []
        self._contents: dict[int, tuple[Where, Any, Any]] = {}  # by an object: itself, and a copy of what it holds
        for place, part in parts:
            held = {name: value for name, value in vars(part).items() if name not in INTERNAL}
            prefix = f"{place}." if place else ""
            self._held.append((prefix, part, held))
            for name, value in held.items():
                if isinstance(value, KEPT):
                    self._keep((part, prefix, name), value)

    def _keep(self, where: Where, value: Any) -> None:
        if id(value) in self._contents:
            return
        if isinstance(value, Tensor):
            if value.grad_fn is None and value.nbytes <= KEPT_BYTES and not value.is_inference():
                self._contents[id(value)] = (where, value, (value._version, value.detach().clone()))
        elif isinstance(value, CONTAINERS):
            self._contents[id(value)] = (where, value, value.copy())
            if where[-1] not in MEMBERS and len(value) <= KEPT_ELEMENTS:
                for each in value.values() if isinstance(value, dict) else value:
                    self._keep(where, each)

    def put_back(self) -> list[str]:
        """Makes all as it was, and returns the names of what was not, without those that no loss depends on."""
        changed: dict[str, None] = {}
        for prefix, part, held in self._held:
            now = vars(part)
            for name in [name for name in {**held, **now} if name not in INTERNAL]:
                before, after = held.get(name, _ABSENT), now.get(name, _ABSENT)
                if before is after:
                    continue
                if not (_is_alike(before, after) or _is_silent(part, name)):
                    changed[prefix + name] = None
                now.pop(name) if before is _ABSENT else now.update({name: before})
        for (part, prefix, name), value, contents in self._contents.values():
            if _restore(value, contents) and not _is_silent(part, name):
                changed[prefix + name] = None
        return list(changed)


def _is_silent(part: nn.Module, name: str) -> bool:
    """Whether an attribute may change: a metric's state, a cached property, or torch's list of an RNN's weights."""
    return (
        isinstance(part, Metric)
        or (isinstance(part, nn.RNNBase) and name.startswith("_flat_weight"))  # until the next forward
        or isinstance(getattr(type(part), name, None), cached_property)
    )


def _is_alike(one: Any, other: Any) -> bool:
    """Whether an attribute that was set again means the same: an equal value, or another forward's result."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        is_result = one.grad_fn is not None or other.grad_fn is not None  # as weight_norm leaves its weight
        return is_result or (one.dtype == other.dtype and torch.equal(one, other))
    return type(one) is type(other) and isinstance(one, int | float | str) and one == other


def _restore(value: Any, contents: Any) -> bool:
    """Puts back what an object holds, and tells whether that was needed."""
    if isinstance(value, Tensor):
        version, copied = contents
        if value._version == version:
            return False
        with torch.no_grad():
            value.copy_(copied)
        return True
    if _holds_the_same(value, contents):
        return False
    value.clear()
    value.extend(contents) if isinstance(value, list | deque) else value.update(contents)
    return True


def _holds_the_same(value: Any, contents: Any) -> bool:
    if isinstance(value, set):
        return bool(value == contents)
    now, then = ([*each, *(each.values() if isinstance(each, dict) else ())] for each in (value, contents))
    return len(now) == len(then) and all(map(is_, now, then))
