import pytest
import torch
from torch import Tensor

from downslope.gradients import vectors
from downslope.gradients.finiteness import RowNorms, wide_norms
from downslope.gradients.norms import norms
from downslope.gradients.vectors import copy, flat


@pytest.fixture(params=["as quick as can be", "by what torch documents"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by what torch documents":
        monkeypatch.setattr(vectors, "_flatten", None)
        monkeypatch.setattr(vectors, "_copy", vectors._copy_each)


SPARSE = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([2.0, 3.0]), (3,), check_invariants=True)
KINDS: dict[str, tuple[list[Tensor], list[float]]] = {
    "dense": ([torch.tensor([[1.0, 2.0]]), torch.tensor(3.0)], [1, 2, 3]),
    "one alone": ([torch.tensor([1.0, 2.0])], [1, 2]),
    "empty": ([torch.zeros(0), torch.tensor([1.0])], [1]),
    "sparse, with duplicates": ([SPARSE, torch.tensor([4.0])], [0, 5, 0, 4]),
    "complex": ([torch.tensor([1 + 2j]), torch.tensor([3.0])], [1, 2, 3]),
    "two types": ([torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.float64)], [1, 2]),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_row_has_all_elements_in_memory_of_its_own(name: str) -> None:
    tensors, expected = KINDS[name]
    row = flat(tensors)
    assert row.tolist() == expected
    assert row.data_ptr() not in [each.data_ptr() for each in tensors if not each.is_sparse and each.numel()]


def test_a_copy_is_equal_for_every_kind() -> None:
    sources = [torch.randn(2, 3), torch.randn(2).bfloat16(), torch.randn(2, dtype=torch.complex64)]
    targets = [torch.empty_like(each) for each in sources]
    copy(targets, sources)
    assert all(torch.equal(*pair) for pair in zip(targets, sources, strict=True))


def test_norms_of_complex_numbers_are_those_of_their_parts() -> None:
    assert norms([torch.tensor([3 + 4j, 12j])]).tolist() == [13.0]  # √(9 + 16 + 144)
    assert wide_norms([torch.tensor([3e30 + 4e30j])]).tolist() == pytest.approx([5e30])


@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_norms_in_a_row_are_those_of_double_precision(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator) * scale for size in ((3, 4), (1,), (), (50,))]
    expected = [float(each.double().square().sum().sqrt()) for each in tensors]
    assert RowNorms(tensors).of(tensors) == pytest.approx(expected, rel=1e-6)


def test_norms_in_a_row_take_a_tensor_that_becomes_sparse() -> None:
    row = RowNorms([torch.zeros(3), torch.zeros(1)])
    assert row.of([SPARSE, torch.tensor([2.0])]) == pytest.approx([5.0, 2.0])
