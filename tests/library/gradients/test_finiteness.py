import math

import pytest
import torch

from downslope.gradients.finiteness import wide_norms


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_is_found(value: float) -> None:
    spoiled = torch.ones(1000)
    spoiled[717] = value
    norms = wide_norms([torch.ones(4), spoiled])
    assert norms[0] == 2.0
    assert not torch.isfinite(norms[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_finite_elements_have_a_finite_norm(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert wide_norms([torch.full((100,), largest, dtype=dtype)]).item() == pytest.approx(10 * largest, rel=1e-6)


def test_sparse_and_empty_tensors_have_a_norm() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 2, 0]]), torch.tensor([1.0, 4.0, 2.0]), (5,), check_invariants=True
    )
    assert wide_norms([sparse, torch.empty(0)]).tolist() == [5.0, 0.0]  # √(3² + 4²): the first element is 1 + 2
    assert wide_norms([]).shape == (0,)
