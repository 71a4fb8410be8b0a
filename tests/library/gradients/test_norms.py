import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.gradients.norms import norms, part_norms, total_norm


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_norms_are_those_of_float64(shapes: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    expected = torch.stack([tensor.double().square().sum().sqrt() for tensor in tensors])
    torch.testing.assert_close(norms(tensors).double(), expected, rtol=1e-5, atol=1e-7)  # float32
    flat = torch.cat([tensor.double().flatten() for tensor in tensors])
    torch.testing.assert_close(total_norm(norms(tensors)).double(), flat.norm(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_long_part_has_its_digits(dtype: torch.dtype, norm_type: float) -> None:
    sizes = [3_000_001, 4096, 4097, 8192, 5, 0]
    vectors = torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = [torch.linalg.vector_norm(part.double(), norm_type, dim=1) for part in vectors.split(sizes, 1)[:-1]]
    found = part_norms(vectors, sizes, norm_type)
    torch.testing.assert_close(found[:, :-1].double(), torch.stack(expected, 1), rtol=1e-6, atol=0.0)
    assert found[:, -1].tolist() == [0.0, 0.0]


def test_norms_are_detached() -> None:
    assert not norms([torch.ones(2, requires_grad=True)]).requires_grad
