"""Gradient norms: by parameter, and over all parameters as one vector."""

from collections.abc import Sequence
from math import inf

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from downslope.gradients.vectors import real

HALF = (torch.float16, torch.bfloat16)
ROW = 4096  # elements


def dense(tensor: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
    """Returns a sparse gradient's values, duplicates added up, or a dense one as it is: the same norm, detached."""
    tensor = tensor.detach()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def norms(tensors: Sequence[Inexact[Tensor, "..."]], norm_type: float = 2.0) -> Float[Tensor, " num_tensors"]:
    """Returns the norm of each tensor, in one fused call and without a synchronisation.

    ‖x‖₂ = √(Σᵢ xᵢ²), a sum without 1/N, or ‖x‖_∞ = maxᵢ |xᵢ|; of nothing 0. Half precision is added up in float32;
    of complex numbers |xᵢ| is the absolute value.

    Args:
        tensors: At least one, of any shapes, dense or sparse.
        norm_type: 2 or infinity.

    Returns:
        One norm a tensor, on the device of the first, detached.

    Example:
        >>> norms([torch.tensor([3.0, -4.0]), torch.tensor([[2.0]])])
        tensor([5., 2.])
        >>> norms([torch.tensor([3.0, -4.0]), torch.tensor([[2.0]])], norm_type=inf)
        tensor([4., 2.])
    """
    values = [dense(tensor) if tensor.is_sparse else tensor for tensor in tensors]
    if norm_type == inf:  # the largest of nothing is no number
        values = [value if value.numel() else value.new_zeros(1) for value in values]
    kinds = {(value.device, value.dtype) for value in values}
    half = any(dtype in HALF for _, dtype in kinds)
    if half:
        values = [real(value) for value in values]
    with torch.no_grad():
        each = _fused(values, norm_type, torch.float32 if half else None)
        if len(kinds) > 1:
            each = tuple(norm.to(each[0].device, torch.float64) for norm in each)
        return torch.stack(each)


def part_norms(
    vectors: Float[Tensor, "steps num_elements"], sizes: Sequence[int], norm_type: float = 2.0
) -> Float[Tensor, "steps num_parts"]:
    """Returns the norm of each part of vectors that were put together of tensors: `norms`, for many steps at once.

    Args:
        vectors: One for each step.
        sizes: Of the parts, in their order.
        norm_type: 2 or infinity.

    Example:
        >>> part_norms(torch.tensor([[3.0, -4.0, 2.0], [0.0, 1.0, 0.0]]), [2, 1])
        tensor([[5., 2.],
                [1., 0.]])
    """
    dtype = torch.float32 if vectors.dtype in HALF else vectors.dtype
    # Elsewhere than on a CPU each call takes as long as a million elements do.
    if len(vectors) < len(sizes) and not vectors.is_cpu and 0 not in sizes:
        return torch.stack([torch.stack(_fused(row.split(sizes), norm_type, dtype)) for row in vectors])
    parts = [part if part.shape[1] else vectors.new_zeros(len(vectors), 1) for part in vectors.split(sizes, dim=1)]
    return torch.stack([_norm(part, norm_type, dtype) for part in parts], dim=1)


def _fused(
    tensors: list[Tensor] | tuple[Tensor, ...], norm_type: float, dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """In one call, but for the L2 norms of long ones on a CPU."""
    if norm_type == 2 and tensors[0].is_cpu and max(each.numel() for each in tensors) >= 2 * ROW:
        return tuple(_norm(each.reshape(1, -1), norm_type, dtype or each.dtype)[0] for each in map(real, tensors))
    fused: tuple[Tensor, ...] = torch._foreach_norm(tensors, norm_type, dtype=dtype)
    return fused


def _norm(part: Tensor, norm_type: float, dtype: torch.dtype) -> Tensor:
    """Of each row; long ones by pieces: on a CPU a sum of 10⁷ squares in float32 is off in its fourth digit."""
    num_pieces = part.shape[1] // ROW
    if num_pieces > 1:
        pieces, rest = part[:, : num_pieces * ROW].unflatten(1, (num_pieces, ROW)), part[:, num_pieces * ROW :]
        part = torch.cat([torch.linalg.vector_norm(pieces, norm_type, dim=2, dtype=dtype), rest.to(dtype)], dim=1)
    norm: Tensor = torch.linalg.vector_norm(part, norm_type, dim=1, dtype=dtype)
    return norm


def total_norm(parameter_norms: Float[Tensor, "*steps num_tensors"], norm_type: float = 2.0) -> Float[Tensor, "*steps"]:
    """Returns the norm of all parameters as one vector, given the norm of each.

    ‖(x₁, x₂, …)‖₂ = √(‖x₁‖₂² + ‖x₂‖₂² + …), and ‖(x₁, x₂, …)‖_∞ = max(‖x₁‖_∞, ‖x₂‖_∞, …)

    Args:
        parameter_norms: One norm a tensor, for one step or many.
        norm_type: The one that they were taken in.

    Example:
        >>> total_norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    total: Tensor = torch.linalg.vector_norm(parameter_norms, norm_type, dim=-1)
    return total
