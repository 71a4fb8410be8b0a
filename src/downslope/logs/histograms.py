"""How values are spread, as TensorBoard stores it."""

from itertools import accumulate, repeat
from operator import mul

import numpy as np
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from torch import Tensor

from downslope.logs.event_files import varint

_POSITIVE = list(accumulate(repeat(1.1, 773), mul, initial=1e-12))  # up to 1e20
EDGES = np.array([-edge for edge in reversed(_POSITIVE)] + [0.0] + _POSITIVE)


def histogram(values: Tensor) -> HistogramProto:
    """Returns how finite values on a CPU are spread over bins that grow by a tenth each.

    They are the bins of torch's `add_histogram`, which takes four times as long; the outermost hold what is beyond.
    """
    ordered = np.sort(values.numpy()).astype(np.float64)
    first, last = np.searchsorted(EDGES, ordered[[0, -1]], side="right").clip(1, len(EDGES) - 1)
    limits = EDGES[first - 1 : last + 1]  # upper ones: the first bin is empty, and there for its limit
    below = np.searchsorted(ordered, limits)
    below[0], below[-1] = 0, len(ordered)
    encoded = HistogramProto(
        min=ordered[0], max=ordered[-1], num=len(ordered), sum=ordered.sum(), sum_squares=np.dot(ordered, ordered)
    )
    size = varint(limits.nbytes)
    counts = np.diff(below, prepend=0).astype(np.float64)
    encoded.MergeFromString(b"\x32%b%b\x3a%b%b" % (size, limits.tobytes(), size, counts.tobytes()))  # fields 6 and 7
    return encoded
