"""Every process-wide random state: taken, and put back."""

import contextlib
import ctypes
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MT19937_BYTES = 4 * 624 + 4  # the words, and the place among them


class RandomState:
    """The random state of this moment: torch's on each device, Python's, and NumPy's if it is loaded.

    Example:
        >>> state = RandomState()
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> torch.equal(first, torch.rand(3))
        True
    """

    def __init__(self) -> None:
        self._python: Any = random.getstate()
        self._numpy = _numpy_state()
        self._cpu: Tensor = torch.get_rng_state()
        has_cuda = torch.cuda.is_initialized()  # to ask for more would start it
        self._cuda: Any = torch.cuda.get_rng_state_all() if has_cuda else None
        self._mps: Any = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        """Makes the next random numbers those that came next then."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        if self._numpy is not None and _numpy_state() is not self._numpy:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)


_last_numpy: tuple[bytes, Any] = (b"", None)


def _numpy_state() -> Any:
    """NumPy's state, the same object while nothing has been drawn; None if NumPy is not loaded.

    NumPy takes 30 µs to tell it, but half a microsecond to show its memory. There a spare normal number, which
    `numpy.random.normal` makes of each pair, is not to be seen: with one at hand it is always asked.
    """
    global _last_numpy
    if "numpy" not in sys.modules:
        return None
    numpy_random = sys.modules["numpy"].random
    generator = numpy_random.get_bit_generator()
    if type(generator) is not numpy_random.MT19937:
        return numpy_random.get_state()
    memory = ctypes.string_at(generator.ctypes.state_address, MT19937_BYTES)
    if memory != _last_numpy[0] or _last_numpy[1][3]:
        _last_numpy = memory, numpy_random.get_state()
    return _last_numpy[1]


@contextlib.contextmanager
def random_state(start: RandomState | None = None) -> Iterator[None]:
    """Runs a block from a random state, or from the one that is there, and leaves the one that is there.

    Args:
        start: Where the block starts.
    """
    before = RandomState()
    (start or before).restore()
    try:
        yield
    finally:
        before.restore()
