"""Traces of mistakes beside gradients and steps: in the graph behind a loss, in the modules, in a batch."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LOSSES = ("NllLoss", "BinaryCrossEntropy", "MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss")
# What stands between a loss and the number that is differentiated, and between a loss and the network's output.
AROUND = ("Div", "Mul", "Neg", "Mean", "Sum", "ToCopy", "View", "Squeeze", "LogSoftmax", "Expand")
ONE_TOO_MANY = "the loss applies a {} to what has gone through one: is one too many?"
OVER_ROWS = "the loss's softmax goes over the rows of the batch: is it meant to go over the classes?"
MEAN = 1  # of autograd's reductions
HUGE = 1e4


class LossTraces(NamedTuple):
    """What a loss is of; `level` is computed when it is asked, so that no step waits for it."""

    squashed: str = ""  # how softmax or sigmoid stands in the wrong place
    broadcast: str = ""  # the shapes of output and target, where they differ
    is_maximised: bool = False
    is_whole: bool = False  # nothing was done to it before it is differentiated
    level: Callable[[], float] | None = None  # this loss of the best output that ignores the inputs

    def state(self) -> list[Any]:
        """Returns it as plain data, for a checkpoint."""
        return [*self[:-1], self.level and self.level()]

    @classmethod
    def from_state(cls, state: list[Any]) -> "LossTraces":
        """Returns what `state` made plain data of."""
        squashed, broadcast, is_maximised, is_whole, level = state
        return cls(squashed, broadcast, is_maximised, is_whole, None if level is None else lambda: level)


def traces_of_loss(loss: Tensor) -> LossTraces:
    """Returns what the graph behind a loss tells, before `backward` frees it. Nothing is computed.

    Example:
        >>> output, target = torch.randn(4, 1, requires_grad=True), torch.tensor([0, 0, 0, 0])
        >>> traces = traces_of_loss(-nn.functional.cross_entropy(output.softmax(1), target))
        >>> traces.squashed, traces.is_maximised
        ('the loss applies a softmax to what has gone through one: is one too many?', True)
    """
    nodes = [*_chain(loss.grad_fn)]
    names = [type(node).__name__.partition("Backward")[0] for node in nodes]
    place = next((index for index, name in enumerate(names) if name.startswith(LOSSES)), None)
    if place is None:
        return LossTraces()
    before = names[place + 1 :]
    squashed = ""
    if names[place] == "NllLoss" and before[:1] == ["LogSoftmax"]:
        squashed = ONE_TOO_MANY.format("softmax") if "Softmax" in before else ""
        squashed = OVER_ROWS if nodes[place + 1]._saved_dim == 0 else squashed
    if names[place] == "BinaryCrossEntropyWithLogits" and "Sigmoid" in before:
        squashed = ONE_TOO_MANY.format("sigmoid")
    broadcast, target = "", _saved(nodes[place], "target")
    if "Expand" in before[:1] and target is not None:
        broadcast = f"{tuple(nodes[place + 1]._saved_self_sym_sizes)} against {tuple(target.shape)}"
    divisor = 1 if place == 0 else _divisor(nodes[0]) if place == 1 else None
    level = _level(nodes[place], names[place], target) if divisor and target is not None and not broadcast else None
    return LossTraces(squashed, broadcast, names[:place].count("Neg") % 2 == 1, divisor == 1, level)


def _divisor(node: Any) -> int | None:
    """What a loss was divided by, if a whole number, as Lightning divides by that of batches; read without waiting."""
    other = _saved(node, "other") if type(node).__name__.startswith("Div") else None
    if other is None or not other.is_cpu:
        return None
    return int(other) if other.ndim == 0 and not other.is_floating_point() else None


def _chain(node: Any) -> Iterator[Any]:
    """The first inputs one after the other, down to the first that is the network's."""
    for _ in range(12):
        if node is None:
            return
        yield node
        if not type(node).__name__.startswith((*AROUND, *LOSSES)):
            return
        node = next((earlier for earlier, _ in node.next_functions if earlier is not None), None)


def _saved(node: Any, name: str) -> Tensor | None:
    """What a function keeps for its backward; None where a hook, such as checkpointing's, would compute it anew."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    saved = None if raw is None or getattr(raw, "unpack_hook", raw) else getattr(node, f"_saved_{name}")
    return saved.detach() if isinstance(saved, Tensor) else None


def _level(node: Any, name: str, target: Tensor) -> Callable[[], float] | None:
    """What computes the entropy of a batch's classes, or the mean variance of its targets, when it is asked."""
    if node._saved_reduction != MEAN or _saved(node, "weight") is not None:
        return None
    if name.startswith("NllLoss"):
        return partial(_entropy, target, node._saved_ignore_index)
    if name == "MseLoss" and len(target) > 1:
        return lambda: float(target.float().var(0).mean())
    if name == "BinaryCrossEntropyWithLogits":
        return partial(_binary_entropy, target)
    return None


def _entropy(target: Tensor, ignored: int) -> float:
    counts = torch.bincount(target[target != ignored].flatten()).float()
    few = ((counts > 0).sum() - 1) / (2 * counts.sum())  # the bias of few rows: Miller (1955)
    return float(torch.special.entr(counts / counts.sum()).sum() + few)


def _binary_entropy(target: Tensor) -> float:
    share = target.float().mean(0)
    return float((torch.special.entr(share) + torch.special.entr(1 - share)).mean())


def traces_of_modules(module: nn.Module) -> dict[str, Any]:
    """Returns which layers do not what they do in training, by name."""
    named = [*module.named_modules()]
    norms = [(name, each) for name, each in named if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    frozen = [name for name, each in norms if _is_untouched(each)]
    dropping = [name for name, each in named if isinstance(each, nn.modules.dropout._DropoutNd) and each.p >= 0.9]
    has_norms = any("Norm" in type(each).__name__ for _, each in named)
    return {"not_normalizing": tuple(frozen), "dropping": tuple(dropping), "normalizes": has_norms}


def _is_untouched(norm: nn.Module) -> bool:
    """Whether a layer that is trained uses averages over batches of which it has never seen one."""
    seen = getattr(norm, "num_batches_tracked", None)
    return not norm.training and seen is not None and int(seen) == 0 and any(p.requires_grad for p in norm.parameters())


def input_size(batch: Any) -> float | None:
    """Returns the root mean square of a batch's first tensor of numbers, several a row; None where there is none."""
    tensors = [*_tensors(batch)]
    rows = next((each for each in tensors if each.is_floating_point() and each.ndim > 1 and each.numel()), None)
    return None if rows is None else float(rows.detach().float().square().mean().sqrt())


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | list | tuple):
        for each in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(each)


def broken_rows(recorded: Any) -> str:
    """Returns which rows of a recorded batch are not finite, or HUGE times as large as most, in words.

    Args:
        recorded: `downslope.verdict.flight_record.as_numbers`.

    Example:
        >>> rows = [[0.1, 2.0], [0.3, math.nan], [-1.0, 0.5]]
        >>> broken_rows([{"shape": [3, 2], "dtype": "float32", "row_numbers": [0, 1, 2], "rows": rows}])
        'row 1 of its batch is not finite'
    """
    if isinstance(recorded, dict) and "row_numbers" in recorded:
        sizes = [_size(row) for row in recorded["rows"]]
        most = sorted(sizes)[len(sizes) // 2]
        for is_broken, what in (
            (lambda size: not math.isfinite(size), "not finite"),
            (lambda size: size > HUGE * most > 0, f"more than {HUGE:g} × as large as most"),
        ):
            found = [
                str(number) for number, size in zip(recorded["row_numbers"], sizes, strict=True) if is_broken(size)
            ]
            if 0 < len(found) < len(sizes):
                several = len(found) > 1
                listed = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
                return f"row{'s' * several} {listed} of its batch {'are' if several else 'is'} {what}"
        return ""
    parts = recorded.values() if isinstance(recorded, dict) else recorded if isinstance(recorded, list) else ()
    return next((found for found in map(broken_rows, parts) if found), "")


def _size(row: Any) -> float:
    if isinstance(row, list):
        sizes = [_size(each) for each in row]
        return math.nan if any(map(math.isnan, sizes)) else max(sizes, default=0.0)
    return abs(float(row))
