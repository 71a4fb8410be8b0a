"""How values are spread, counted where they are, and stored as TensorBoard does."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, repeat
from operator import mul

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from torch import Tensor

from downslope.gradients.norms import HALF
from downslope.gradients.sample import Sample
from downslope.gradients.vectors import real

SAMPLE = 2**20  # elements that are counted; minimum, maximum and sums are those of all
ROW = 1024  # elements whose sum float32 holds: in float64 all of them would take six times as long
_POSITIVE = list(accumulate(repeat(1.1, 773), mul, initial=1e-12))  # up to 1e20
EDGES = np.array([-edge for edge in reversed(_POSITIVE)] + [0.0] + _POSITIVE)
# The outermost bins hold what is beyond; outside of these lie −∞ on the left, +∞ and NaN on the right.
_BOUNDARIES = [-torch.finfo(torch.float64).max, *EDGES[1:-1].tolist(), math.inf]


def spreads(tensors: Sequence[Tensor]) -> Tensor:
    """Returns what histograms are made of: counts by bin, and minimum, maximum, Σx and Σx² of the finite elements.

    The bins are those of torch's `add_histogram`, each a tenth wider than the last. Of more than `SAMPLE` elements, all
    tensors together, about so many are counted, spread evenly over all, and their counts scaled up. On a GPU the four
    figures of a tensor that is not finite are none either.

    Args:
        tensors: Each with an element at least, on any device, for whose work nobody waits.

    Returns:
        A row for each, on the device of the first: not finite on the left, the bins, not finite on the right, the four
        figures.
    """
    device = tensors[0].device
    tensors = [each.to(device) for each in tensors]
    wide = torch.float32 if device.type == "mps" else torch.float64
    sample = Sample(tensors, SAMPLE)
    places = torch.bucketize(sample.elements(tensors).to(wide), _boundaries(wide, device), right=True)
    num_bins = len(_BOUNDARIES) + 1
    about = torch.tensor([sample.places, sample.sizes]).to(device, non_blocking=True)
    places += num_bins * about[0].repeat_interleave(about[1], output_size=len(places))
    counts = places.new_zeros(len(tensors) * num_bins).scatter_add_(0, places, torch.ones_like(places))
    shares = torch.empty(len(tensors), dtype=wide)
    shares[sample.places] = torch.tensor(sample.shares, dtype=wide)
    counted = counts.view(-1, num_bins).to(wide) / shares.to(device, non_blocking=True)[:, None]
    values = [real(each.detach().to_dense()).reshape(-1) for each in tensors]
    return torch.cat([counted, _figures(values, wide)], dim=1)


@cache
def _boundaries(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_BOUNDARIES, dtype=dtype, device=device)


def _figures(vectors: list[Tensor], wide: torch.dtype) -> Tensor:
    """Minimum, maximum, Σx and Σx² of each, in two calls a vector where it is the call that takes time."""
    if vectors[0].is_cpu:
        return torch.stack([figure for each in vectors for figure in _finite_figures(each, wide)]).view(-1, 4)
    lows, highs = zip(*(each.aminmax() for each in vectors), strict=True)
    sums, norms = [each.sum(dtype=wide) for each in vectors], torch._foreach_norm(vectors, dtype=wide)
    low, high, total, norm = (torch.stack(each).to(wide) for each in (lows, highs, sums, norms))
    return torch.stack([low, high, total, norm.square()], dim=1)


def _finite_figures(values: Tensor, wide: torch.dtype) -> list[Tensor]:
    """Those of one vector on a CPU, where to look is no waiting."""
    values = values.float() if values.dtype in HALF else values
    low, high = values.aminmax()
    if not (math.isfinite(low) and math.isfinite(high)):
        finite = values.isfinite()
        low, high = values.where(finite, math.inf).amin(), values.where(finite, -math.inf).amax()
        values = values.where(finite, 0.0)
    whole = len(values) - len(values) % ROW
    rows, rest = values[:whole].view(-1, ROW), values[whole:].to(wide)
    total = rows.sum(1).to(wide).sum() + rest.sum()
    squares = torch.linalg.vector_norm(rows, dim=1).to(wide).square().sum() + rest.square().sum()
    return [low.to(wide), high.to(wide), total, squares]


def histogram(spread: NDArray[np.float64]) -> HistogramProto | None:
    """Returns a row of `spreads` as TensorBoard stores it; None where nothing is finite.

    Figures that are missing are those of the bins' middles.
    """
    counts, figures = spread[1:-5], spread[-4:]
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    first, last = filled[[0, -1]]
    if not np.isfinite(figures).all():
        middles = (EDGES[1:] + EDGES[:-1]) / 2
        figures = np.array([EDGES[first], EDGES[last + 1], counts @ middles, counts @ middles**2])
    low, high, total, squares = figures
    return HistogramProto(
        min=low, max=high, num=counts.sum(), sum=total, sum_squares=squares,
        bucket_limit=EDGES[first : last + 2].tolist(),  # upper ones: the first bin is empty, and there for its limit
        bucket=[0.0, *counts[first : last + 1].tolist()],
    )  # fmt: skip


def num_not_finite(spread: NDArray[np.float64]) -> int:
    """Returns how many of the counted elements are no numbers, or infinite."""
    return int(spread[0] + spread[-5])
