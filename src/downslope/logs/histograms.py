"""How values are spread, counted where they are, and stored as TensorBoard does."""

import math
from functools import cache
from itertools import accumulate, repeat
from operator import mul

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from torch import Tensor

from downslope.gradients.norms import HALF

SAMPLE = 2**20  # elements of a tensor that are counted; minimum, maximum and sums are those of all
ROW = 1024  # elements whose sum float32 holds: in float64 all of them would take six times as long
_POSITIVE = list(accumulate(repeat(1.1, 773), mul, initial=1e-12))  # up to 1e20
EDGES = np.array([-edge for edge in reversed(_POSITIVE)] + [0.0] + _POSITIVE)
# The outermost bins hold what is beyond; outside of these lie −∞ on the left, +∞ and NaN on the right.
_BOUNDARIES = [-torch.finfo(torch.float64).max, *EDGES[1:-1].tolist(), math.inf]


def spread(values: Tensor) -> Tensor:
    """Returns what a histogram is made of: counts by bin, and minimum, maximum, Σx and Σx² of the finite elements.

    The bins are those of torch's `add_histogram`, each a tenth wider than the last. Of more than `SAMPLE` elements so
    many are counted, spread evenly over all, and their counts scaled up.

    Args:
        values: At least one, in one dimension, on any device, for whose work nobody waits.

    Returns:
        One vector on their device: not finite on the left, the bins, not finite on the right, the four figures.
    """
    values = values.detach().float() if values.dtype in HALF else values.detach()
    sample = values if len(values) <= SAMPLE else values[_evenly(len(values), values.device)]
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    places = torch.bucketize(sample.to(wide), _boundaries(wide, values.device), right=True)
    counts = values.new_zeros(len(_BOUNDARIES) + 1, dtype=torch.long).scatter_add_(0, places, torch.ones_like(places))
    return torch.cat([counts.to(wide) * (len(values) / len(sample)), torch.stack(_figures(values, wide))])


@cache
def _boundaries(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_BOUNDARIES, dtype=dtype, device=device)


def _evenly(length: int, device: torch.device) -> Tensor:
    """Places of `SAMPLE` elements: one in each of so many equal stretches, where within it differs.

    Every n-th element would be one column of a matrix as often as not.
    """
    stretch = torch.arange(SAMPLE, device=device)
    return (stretch * length >> 20) + ((stretch * 40503 & 0xFFFF) * length >> 36)


def _figures(values: Tensor, wide: torch.dtype) -> list[Tensor]:
    low, high = values.aminmax()
    if not (values.is_cpu and math.isfinite(low) and math.isfinite(high)):  # of a device, to ask would be to wait
        finite = values.isfinite()
        low, high = values.where(finite, math.inf).amin(), values.where(finite, -math.inf).amax()
        values = values.where(finite, 0.0)
    whole = len(values) - len(values) % ROW
    rows, rest = values[:whole].view(-1, ROW), values[whole:].to(wide)
    total = rows.sum(1).to(wide).sum() + rest.sum()
    squares = torch.linalg.vector_norm(rows, dim=1).to(wide).square().sum() + rest.square().sum()
    return [low.to(wide), high.to(wide), total, squares]


def histogram(spread: NDArray[np.float64]) -> HistogramProto | None:
    """Returns what `spread` counted, as TensorBoard stores it; None where nothing is finite."""
    counts, (low, high, total, squares) = spread[1:-5], spread[-4:]
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    first, last = filled[[0, -1]]
    return HistogramProto(
        min=low, max=high, num=counts.sum(), sum=total, sum_squares=squares,
        bucket_limit=EDGES[first : last + 2].tolist(),  # upper ones: the first bin is empty, and there for its limit
        bucket=[0.0, *counts[first : last + 1].tolist()],
    )  # fmt: skip


def num_not_finite(spread: NDArray[np.float64]) -> int:
    """Returns how many of the counted elements are no numbers, or infinite."""
    return int(spread[0] + spread[-5])
