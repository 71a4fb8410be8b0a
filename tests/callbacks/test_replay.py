import random

import numpy as np
import torch

from downslope.callbacks.replay import random_state, restore_random_state


def test_every_generator_is_set_back() -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002

    cpu = torch.device("cpu")
    state = random_state(cpu)
    first = draw()
    assert draw() != first
    restore_random_state(state, cpu)
    assert draw() == first
