"""Many tensors at once: copied, or put in a row.

torch has quick ways for both that it does not document; where they are missing, or do not fit the tensors, what is
documented does the same.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from jaxtyping import Shaped
from torch import Tensor

_flatten = getattr(torch._C._nn, "flatten_dense_tensors", None)


def real(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Returns a complex tensor's real and imaginary parts on a last axis, as a view; any other as it is.

    Example:
        >>> real(torch.tensor([3 + 4j]))
        tensor([[3., 4.]])
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def num_elements(tensor: Shaped[Tensor, "..."]) -> int:
    """Returns how many real numbers a tensor holds: two for each element of a complex one."""
    return tensor.numel() * (1 + tensor.is_complex())


def flat(tensors: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, " num_elements"]:
    """Returns a copy of tensors as one real vector, dense and on the device of the first; detached; of none, empty.

    Example:
        >>> flat([torch.tensor([[1.0, 2.0]]), torch.tensor(3.0)])
        tensor([1., 2., 3.])
    """
    if _flatten and len(tensors) > 1:  # of one it would be a view
        with suppress(RuntimeError):  # sparse ones, or several devices
            vector: Tensor = _flatten(tensors)
            if not vector.is_complex():
                return vector.detach()
    if not tensors:
        return torch.empty(0)
    return torch.cat([real(each.detach().to_dense()).flatten().to(tensors[0].device) for each in tensors])


def shaped(row: Shaped[Tensor, " num_elements"], like: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Returns a tensor's part of a `flat` vector in the tensor's own shape and kind.

    Example:
        >>> shaped(torch.tensor([3.0, 4.0]), torch.tensor([0j]))
        tensor([3.+4.j])
    """
    if like.is_complex():
        row = torch.complex(*row.reshape(*like.shape, 2).unbind(-1))  # a view may stand at an odd place
    return row.view_as(like).to(like)


def clones(tensors: Sequence[Shaped[Tensor, "..."]]) -> list[Tensor]:
    """Returns a copy of each tensor, detached."""
    return [each.detach().clone() for each in tensors]


def copy(targets: Sequence[Shaped[Tensor, "..."]], sources: Sequence[Shaped[Tensor, "..."]]) -> None:
    """Copies each source into its target, to be called where autograd does not record.

    Quickest where all are of one type on one device.
    """
    try:
        _copy(targets, sources)
    except RuntimeError:  # sparse ones
        _copy_each(targets, sources)


def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


_copy = getattr(torch, "_foreach_copy_", _copy_each)
