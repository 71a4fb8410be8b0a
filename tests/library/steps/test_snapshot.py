from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from downslope.steps.snapshot import Snapshot, fingerprint


def next_one(tensor: Tensor) -> None:
    tensor[17] = torch.nextafter(tensor[17], tensor[17] + 1)


def swapped(tensor: Tensor) -> None:
    tensor[[3, 80]] = tensor[[80, 3]]


def flipped(tensor: Tensor) -> None:
    tensor[5] *= -1


def up_and_down(tensor: Tensor) -> None:
    tensor[4:7] = torch.nextafter(tensor[4:7], tensor[4:7] + torch.tensor([1, -1, 1]))


@pytest.mark.parametrize("change", [next_one, swapped, flipped, up_and_down])
@pytest.mark.parametrize("length", [100, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fingerprint_sees_a_single_bit(change: Callable[[Tensor], None], length: int, dtype: torch.dtype) -> None:
    for seed in range(20):
        tensor = torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        others = [torch.ones(3, dtype=kind) for kind in (torch.bfloat16, torch.bool, torch.complex128)]
        others += [torch.tensor(7), torch.zeros(0)]
        before = [*map(int, fingerprint([tensor, *others]))]
        assert [*map(int, fingerprint([tensor.clone(), *others]))] == before
        change(tensor)
        assert [*map(int, fingerprint([tensor, *others]))] != before


def test_a_state_among_an_optimizers_settings_is_put_back() -> None:
    class ScheduleFree(SGD):
        """Counts in its group, as schedule-free optimizers do."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch has overloads
            super().step(closure)
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1

    weight = nn.Parameter(torch.ones(2))
    optimizer = ScheduleFree([weight], lr=0.5)
    weight.grad = torch.ones(2)
    optimizer.step()
    snapshot = Snapshot([optimizer])
    with torch.no_grad():
        snapshot.take_all()
    optimizer.step()
    snapshot.restore()
    assert (weight.tolist(), optimizer.param_groups[0]["k"]) == ([0.5, 0.5], 1)
