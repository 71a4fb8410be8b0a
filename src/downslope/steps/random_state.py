"""Every process-wide random state: taken, and put back."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn


class RandomState:
    """The random state of this moment: torch's on each device, Python's, and NumPy's if it is loaded.

    Args:
        generators: Others that belong to it, as `own_generators` finds them.

    Example:
        >>> state = RandomState()
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> torch.equal(first, torch.rand(3))
        True
    """

    def __init__(self, *generators: Any) -> None:
        self._python: Any = random.getstate()
        self._numpy: Any = None
        if "numpy" in sys.modules:
            state = self._numpy = sys.modules["numpy"].random.get_state(legacy=False)
            if state["bit_generator"] == "MT19937":  # NumPy puts back its own array in twenty times the time
                words, place = state["state"]["key"].tolist(), state["state"]["pos"]
                self._numpy = ("MT19937", words, place, state["has_gauss"], state["gauss"])
        self._cpu: Tensor = torch.get_rng_state()
        has_cuda = torch.cuda.is_initialized()  # to ask for more would start it
        self._cuda: Any = torch.cuda.get_rng_state_all() if has_cuda else None
        self._mps: Any = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        self._generators = [(each, _kinds()[type(each)][0](each)) for each in generators]

    def state_dict(self) -> dict[str, Any]:
        """Returns the process-wide states as plain tensors and plain data."""
        python, numpy = (
            (state[0], _packed(state[1]), *state[2:]) if isinstance(state, tuple) else state
            for state in (self._python, self._numpy)
        )
        return {"python": python, "numpy": numpy, "cpu": self._cpu, "cuda": self._cuda, "mps": self._mps}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "RandomState":
        """Returns the random state that `state_dict` made the dictionary of."""
        self = cls.__new__(cls)
        self._generators = []
        for name, value in state.items():
            setattr(self, f"_{name}", tuple(map(_plain, value)) if isinstance(value, tuple) else value)
        return self

    def restore(self) -> None:
        """Makes the next random numbers those that came next then."""
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)
        for each, state in self._generators:
            _kinds()[type(each)][1](each, state)


def _kinds() -> dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], object]]]:
    """How the state of a generator is taken, and how it is put back."""
    kinds: dict[type, tuple[Any, Any]] = {
        torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
        random.Random: (random.Random.getstate, random.Random.setstate),
    }
    if "numpy" in sys.modules:
        state = attrgetter("bit_generator.state")
        kinds[sys.modules["numpy"].random.Generator] = state, lambda each, to: setattr(each.bit_generator, "state", to)
    return kinds


def own_generators(parts: Iterable[nn.Module]) -> list[Any]:
    """Returns the generators, of torch, Python and NumPy, that modules keep as attributes."""
    kinds = _kinds()
    return [value for part in parts for value in vars(part).values() if type(value) in kinds]


def _packed(words: Sequence[int]) -> Tensor:
    """Some 600 numbers, which take longer one by one than all weights."""
    return torch.tensor(list(map(int, words)))


def _plain(value: Any) -> Any:
    return tuple(value.tolist()) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def random_state(generators: Sequence[Any] = ()) -> Iterator[None]:
    """Leaves the random states, after a block, as they were before it.

    Args:
        generators: Others beside the process-wide ones.
    """
    before = RandomState(*generators)
    try:
        yield
    finally:
        before.restore()
