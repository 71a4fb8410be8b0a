"""Whether tensors are finite: told by norms that only a non-finite element makes non-finite."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from downslope.gradients.norms import dense, norms
from downslope.gradients.vectors import real


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
    return torch.stack(torch._foreach_norm([real(dense(tensor)) for tensor in tensors], dtype=wide))
