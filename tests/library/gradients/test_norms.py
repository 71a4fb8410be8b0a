import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.gradients.norms import norms, total_norm


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


def test_norms_are_detached() -> None:
    assert not norms([torch.ones(2, requires_grad=True)]).requires_grad
