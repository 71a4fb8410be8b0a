"""Random numbers for the data: each use has a stream of its own, so that none disturbs another."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the numbers are drawn for."""

    SPLIT = 1
    ORDER = 2
    SYNTHETIC = 3


def generator(stream: Stream, *key: int) -> np.random.Generator:
    """Returns a generator that depends on the stream and the key alone (seed, or seed and epoch).

    The process-wide random state is neither read nor changed.
    """
    return np.random.default_rng([stream, *key])
