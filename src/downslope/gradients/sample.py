"""A few elements of many, that stand for all."""

from collections.abc import Sequence
from operator import is_

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from downslope.gradients.vectors import flat, num_elements, real

BLOCK = 64  # elements in a row, that are taken together
SMALL = 4096  # a tensor of fewer elements is taken whole


class Sample:
    """The same elements of some tensors each time: blocks, spread evenly over the large ones, and the small ones whole.

    Args:
        tensors: Of any shapes.
        most: Of up to so many elements all are taken, of more about so many.

    Attributes:
        places: Of which tensor, by its place, each part of a sample is.
        sizes: How many elements each part has.
        shares: And what share of its tensor that is.
        is_whole: Whether all elements are taken.
    """

    def __init__(self, tensors: Sequence[Tensor], most: int) -> None:
        self._tensors = tensors
        lengths = [num_elements(each) for each in tensors]
        self.is_whole = sum(lengths) <= most
        # Odd, so that it does not meet a matrix in the same columns again and again.
        self._stride = max(1, -(-sum(lengths) // most)) | 1
        self._large = [place for place, length in enumerate(lengths) if length >= SMALL and not self.is_whole]
        self._small = [place for place, length in enumerate(lengths) if length < SMALL or self.is_whole]
        self.places = self._large + self._small
        self.sizes = [BLOCK * len(range(0, lengths[place] // BLOCK, self._stride)) for place in self._large]
        self.sizes += [lengths[place] for place in self._small]
        self.shares = [size / max(lengths[place], 1) for place, size in zip(self.places, self.sizes, strict=True)]
        self._weights: Tensor | None = None

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Tells whether it was made for just these."""
        return len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))

    def elements(self, tensors: Sequence[Inexact[Tensor, "..."]]) -> Float[Tensor, " num_taken"]:
        """Returns a copy of the sample, part after part, of tensors of those shapes; half precision as float32.

        Example:
            >>> Sample([torch.zeros(3)], most=10).elements([torch.tensor([1.0, 2.0, 3.0])])
            tensor([1., 2., 3.])
        """
        chosen = [tensors[place] for place in self._small]
        if self._large:  # views, in a single call: tensor by tensor it would take fifty times as long
            with torch.no_grad():
                blocks = [self._blocks(tensors[place]).to(tensors[0].device) for place in self._large]
                chosen = [torch.cat(blocks), *chosen]
        vector = flat(chosen)
        return vector if vector.dtype == torch.float64 else vector.float()

    def _blocks(self, tensor: Tensor) -> Tensor:
        is_plain = tensor.layout == torch.strided and not tensor.is_complex()  # each call counts on a GPU
        elements = (tensor if is_plain else real(tensor.detach().to_dense())).contiguous()
        num_blocks = len(range(0, elements.numel() // BLOCK, self._stride))
        return elements.as_strided((num_blocks, BLOCK), (BLOCK * self._stride, 1))

    def weighted(self, tensors: Sequence[Inexact[Tensor, "..."]]) -> Float[Tensor, " num_taken"]:
        """Returns `elements` so weighted that a product of two estimates that of all: Σᵢ aᵢbᵢ / sᵢ ≈ ⟨a, b⟩.

        Each is divided by √sᵢ, the root of the share of its tensor that is taken.
        """
        vector = self.elements(tensors)
        if self.is_whole:
            return vector
        if self._weights is None:
            weights = torch.tensor(self.shares, dtype=vector.dtype).rsqrt()
            self._weights = weights.repeat_interleave(torch.tensor(self.sizes)).to(vector.device)
        return vector.mul_(self._weights)
