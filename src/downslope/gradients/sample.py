"""A few elements of many, that stand for all where vectors are multiplied."""

from collections.abc import Sequence
from operator import is_

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from downslope.gradients.vectors import flat, num_elements, real

MOST = 2**18  # elements: a cosine is then known to a few thousandths
BLOCK = 64  # elements in a row, that are taken together
SMALL = 16 * BLOCK  # a tensor of fewer elements is taken whole


class Sample:
    """The same elements of some tensors each time, weighted so that products of two samples estimate those of all.

    With the weight wᵢ, the inverse of the share of its tensor that is taken, Σᵢ √wᵢaᵢ · √wᵢbᵢ over the sample stands
    for ⟨a, b⟩. Of up to `MOST` elements all are taken, and products are exact.

    Args:
        tensors: Of any shapes.
        most: Elements taken of them, about; of small tensors all.

    Attributes:
        sizes: Elements that are taken of each tensor.
        is_whole: Whether all are taken.
    """

    def __init__(self, tensors: Sequence[Tensor], most: int = MOST) -> None:
        self._tensors = tensors
        lengths = [num_elements(each) for each in tensors]
        self.is_whole = sum(lengths) <= most
        stride = max(1, -(-sum(lengths) // most)) | 1  # odd, so that it does not meet a matrix in the same columns
        self._strides = [1 if self.is_whole or length < SMALL else stride for length in lengths]
        self.sizes = [
            length if step == 1 else len(range(0, length // BLOCK, step)) * BLOCK
            for length, step in zip(lengths, self._strides, strict=True)
        ]
        self._weights: Tensor | None = None  # their roots

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Tells whether it was made for just these."""
        return len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))

    def take(self, tensors: Sequence[Inexact[Tensor, "..."]]) -> Float[Tensor, " num_taken"]:
        """Returns the sample of these tensors, of the same shapes, in their order, in float32 or better.

        Example:
            >>> Sample([torch.zeros(3)]).take([torch.tensor([1.0, 2.0, 3.0])])
            tensor([1., 2., 3.])
        """
        parts = [_part(each, step) for each, step in zip(tensors, self._strides, strict=True)]
        vector = flat(parts)
        if vector.dtype != torch.float64:
            vector = vector.float()
        if self.is_whole:
            return vector
        if self._weights is None:
            lengths = torch.tensor([num_elements(each) for each in self._tensors], dtype=vector.dtype)
            sizes = torch.tensor(self.sizes)
            self._weights = (lengths / sizes).sqrt().repeat_interleave(sizes).to(vector.device)
        return vector.mul_(self._weights)


def _part(tensor: Tensor, stride: int) -> Tensor:
    if stride == 1:
        return tensor
    elements = real(tensor.detach().to_dense()).reshape(-1)
    blocks = elements[: len(elements) // BLOCK * BLOCK].view(-1, BLOCK)
    return blocks[::stride]
