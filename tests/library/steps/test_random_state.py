# ruff: noqa: NPY002 — the process-wide generator is the one that is kept
import random

import numpy as np
import pytest
import torch

from downslope.steps.random_state import RandomState, random_state


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


def test_a_spare_normal_number_is_put_back_where_a_state_without_it_was_taken_since() -> None:
    np.random.seed(2)
    np.random.randn()
    with_spare = RandomState()
    spare = np.random.randn()
    without = RandomState()  # at the same place of the generator
    next_one = np.random.randn()
    with_spare.restore()
    with random_state():
        draw()
    assert (np.random.randn(), np.random.randn()) == (spare, next_one)
    without.restore()
    assert np.random.randn() == next_one


def test_a_state_is_read_anew_after_any_draw() -> None:
    for number in (np.random.rand, np.random.randn, lambda: np.random.randint(3), lambda: np.random.shuffle([1, 2])):
        number()
        state = RandomState()
        first = np.random.rand()
        state.restore()
        assert np.random.rand() == first


def test_a_state_that_came_out_of_a_checkpoint_can_be_saved_again() -> None:
    state = RandomState()
    again = RandomState.from_state_dict(RandomState.from_state_dict(state.state_dict()).state_dict())
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    again.restore()
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


def test_another_bit_generator_of_numpys_is_put_back_too() -> None:
    usual = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = RandomState()
        first = draw()
        state.restore()
        assert draw() == first
    finally:
        np.random.set_bit_generator(usual)
