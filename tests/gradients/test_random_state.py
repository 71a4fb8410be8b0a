# ruff: noqa: NPY002 — the process-wide generator is the one that is kept
import random

import numpy as np
import pytest
import torch

from downslope.gradients.random_state import RandomState, random_state


def draw() -> tuple[float, ...]:
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item()


def test_a_restored_state_draws_the_same_again() -> None:
    state = RandomState()
    first = draw()
    state.restore()
    assert draw() == first


@pytest.mark.parametrize("num_normals", [0, 1, 2, 3])
def test_numpys_spare_normal_number_is_kept(num_normals: int) -> None:
    np.random.seed(0)
    for _ in range(num_normals):
        np.random.randn()
    state = RandomState()
    first = np.random.randn(), np.random.randn()
    state.restore()
    assert (np.random.randn(), np.random.randn()) == first


def test_a_block_leaves_every_generator_where_it_was() -> None:
    np.random.seed(1)
    np.random.randn()  # one spare
    state = RandomState()
    expected = draw()
    state.restore()
    with random_state():
        draw()
    assert draw() == expected
