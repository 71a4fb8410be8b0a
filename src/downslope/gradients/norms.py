"""Gradient norms: L2 by parameter, and over all parameters as one vector."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def norms(tensors: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, " num_tensors"]:
    """Returns the L2 norm of each tensor, in one fused call and without a synchronisation.

    ‖x‖ = √(Σᵢ xᵢ²), a sum without 1/N.

    Args:
        tensors: At least one, of any shapes, dense, on one device.

    Returns:
        One norm a tensor, on their device, detached.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.tensor([[2.0]])])
        tensor([5., 2.])
    """
    return torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors]))


def total_norm(parameter_norms: Float[Tensor, " num_tensors"]) -> Float[Tensor, ""]:
    """Returns the L2 norm of all parameters as one vector, given the norm of each.

    ‖(x₁, x₂, …)‖ = √(‖x₁‖² + ‖x₂‖² + …)

    Example:
        >>> total_norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    total: Tensor = torch.linalg.vector_norm(parameter_norms)
    return total
