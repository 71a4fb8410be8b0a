"""Every process-wide random state: taken, and put back."""

import contextlib
import ctypes
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


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
        self._numpy: Any = _numpy.get() if "numpy" in sys.modules else None
        self._cpu: Tensor = torch.get_rng_state()
        has_cuda = torch.cuda.is_initialized()  # to ask for more would start it
        self._cuda: Any = torch.cuda.get_rng_state_all() if has_cuda else None
        self._mps: Any = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the states as plain tensors and plain data."""
        numpy = self._numpy and (self._numpy[0], list(map(int, self._numpy[1])), *self._numpy[2:])
        return {"python": self._python, "numpy": numpy, "cpu": self._cpu, "cuda": self._cuda, "mps": self._mps}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "RandomState":
        """Returns the random state that `state_dict` made the dictionary of."""
        self = cls.__new__(cls)
        for name, value in state.items():
            setattr(self, f"_{name}", value)
        return self

    def restore(self) -> None:
        """Makes the next random numbers those that came next then."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        if self._numpy is not None:
            _numpy.set(self._numpy)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)


class _Numpy:
    """NumPy's state; the same object as the last time while nothing is drawn, because it takes NumPy 60 µs to make.

    What a draw changes is seen in the generator's own memory: 624 words and the place in them. Only a normal number
    that waits, drawn beside another, is not kept there: then, and under another generator, nothing is assumed.
    """

    def __init__(self) -> None:
        self._memory = b""
        self._state: Any = None

    def get(self) -> Any:
        random = sys.modules["numpy"].random
        generator = random.get_bit_generator()
        known = type(generator) is random.MT19937
        memory = ctypes.string_at(generator.ctypes.state_address, 625 * 4) if known else b""
        if not memory or memory != self._memory:
            self._state = random.get_state()
            waits = not known or self._state[3]
            self._memory = b"" if waits else memory
        return self._state

    def set(self, state: Any) -> None:
        if state is not self.get():
            sys.modules["numpy"].random.set_state(state)
            self._memory = b""  # a normal number may wait again


_numpy = _Numpy()


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
