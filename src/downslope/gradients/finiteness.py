"""Whether tensors are finite: told by norms that only a non-finite element makes non-finite."""

import math
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from downslope.gradients.norms import dense, norms
from downslope.gradients.vectors import copy, real

SMALL = 4096  # elements a tensor: larger ones take longer to copy


class RowNorms:
    """`wide_norms` of small tensors on a CPU, step by step the same: as parts of one vector, three times as quick.

    Args:
        tensors: As they are at one of the steps.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        kinds = {(tensor.device.type, tensor.dtype, tensor.layout) for tensor in tensors}
        plain = kinds in [{("cpu", dtype, torch.strided)} for dtype in (torch.float32, torch.float64)]
        self._fits = plain and all(sizes) and sum(sizes) <= SMALL * len(sizes)
        if self._fits:
            vector = torch.empty(sum(sizes), dtype=tensors[0].dtype)
            self._numbers = vector.numpy()  # the same memory
            parts = zip(vector.split(sizes), tensors, strict=True)
            self._parts = [part.view(tensor.shape) for part, tensor in parts]
            self._starts = np.cumsum([0, *sizes[:-1]])

    def of(self, tensors: Sequence[Tensor]) -> Tensor | list[float]:
        """Returns the norms: as numbers on a CPU, where nothing has to be waited for."""
        if self._fits:
            with suppress(RuntimeError), np.errstate(over="ignore"):  # a gradient is sparse that was not before
                copy(self._parts, tensors)
                squares = np.add.reduceat(np.square(self._numbers, out=self._numbers), self._starts)
                norms: list[float] = np.sqrt(squares).tolist()
                if math.isfinite(sum(norms)):
                    return norms
        return norms_now(tensors)


def norms_now(tensors: Sequence[Tensor]) -> Tensor | list[float]:
    """Returns `wide_norms`, on a CPU as numbers at once: there nothing has to be waited for."""
    wide = wide_norms(tensors)
    return wide.tolist() if wide.is_cpu else wide


def wide_norms(tensors: Sequence[Inexact[Tensor, "..."]]) -> Float[Tensor, " num_tensors"]:
    """Returns the L2 norm of each tensor; it is finite if and only if every element is.

    ‖x‖ = √(Σᵢ xᵢ²), a sum without 1/N. In float32 squares overflow from 1.8e19 on, and a norm of inf would tell nothing
    of the elements; in float64 those of a float32 tensor cannot. That sum takes a CPU five times as long, so that there
    it is only made where the quick one is not finite: to look at that is cheap on a CPU, and would be a synchronisation
    elsewhere. Half precision is added up in float32. (Apple's GPUs have no float64: a norm beyond 1.8e19 is inf there.)

    Args:
        tensors: Of any shapes, dense or sparse, on one device.

    Returns:
        One norm a tensor, in float64 (float32 on Apple's GPUs), on their device, detached.

    Example:
        >>> wide_norms([torch.tensor([3e30, 4e30]), torch.tensor([1.0, float("nan")])])
        tensor([5.0000e+30,        nan], dtype=torch.float64)
    """
    if not tensors:
        return torch.empty(0, dtype=torch.float64)
    device = tensors[0].device.type
    if device == "cpu":
        quick = norms(tensors).double()
        if math.isfinite(quick.sum().item()):
            return quick
    wide = torch.float32 if device == "mps" else torch.float64
    values = [real(dense(each)) if each.is_sparse or each.is_complex() else each for each in tensors]
    with torch.no_grad():
        return torch.stack(torch._foreach_norm(values, dtype=wide))
