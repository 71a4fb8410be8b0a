import pytest
import torch
from torch import Tensor

from downslope.gradients.sample import SMALL, Sample

SHAPES = [(600, 512), (7,), (1200, 256), (SMALL - 1,), (100, 77), ()]


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_a_product_of_two_samples_is_about_that_of_all() -> None:
    one, noise = tensors(0), tensors(1)
    other = [each + 2 * more for each, more in zip(one, noise, strict=True)]
    exact = sum(float(a.double().flatten() @ b.double().flatten()) for a, b in zip(one, other, strict=True))
    num = sum(each.numel() for each in one)
    sample = Sample(one, num // 8)
    assert not sample.is_whole
    taken, others = sample.weighted(one), sample.weighted(other)
    assert len(taken) == sum(sample.sizes) < num / 6
    # Each term has mean 1 and variance 2 + 4: of a sample of n the mean is known to √(6/n).
    assert float(taken @ others) == pytest.approx(exact, rel=4 * (6 / len(taken)) ** 0.5)
    assert torch.equal(taken, sample.weighted(one))


def test_the_weights_of_all_parts_add_up_to_all_elements() -> None:
    ones = [torch.ones(shape) for shape in SHAPES]
    sample = Sample(ones, 50_000)
    weighted = sample.weighted(ones)
    assert float(weighted @ weighted) == pytest.approx(sum(each.numel() for each in ones), rel=1e-4)


def test_the_blocks_of_a_matrix_are_not_of_the_same_columns() -> None:
    columns = torch.arange(1024.0).repeat(2048, 1)
    taken = Sample([columns], 100_000).elements([columns])
    assert torch.equal(taken.unique(), torch.arange(1024.0))


def test_the_parts_stand_where_the_sample_says() -> None:
    numbered = [torch.full(shape, float(number)) for number, shape in enumerate(SHAPES)]
    sample = Sample(numbered, 50_000)
    parts = sample.elements(numbered).split(sample.sizes)
    for place, share, part in zip(sample.places, sample.shares, parts, strict=True):
        assert (part == place).all()
        assert len(part) == pytest.approx(share * numbered[place].numel())


def test_of_few_elements_all_are_taken_in_their_order() -> None:
    few = [*tensors(2)[1:2], torch.tensor([1 + 2j]), torch.tensor([3.0]).to_sparse()]
    sample = Sample(few, 100)
    assert sample.is_whole
    assert sample.is_of(few)
    assert not sample.is_of(few[:2])
    assert torch.equal(sample.weighted(few), torch.cat([few[0], torch.tensor([1.0, 2.0, 3.0])]))


def test_half_precision_is_taken_as_float32_and_double_as_it_is() -> None:
    half, double = [torch.ones(3).bfloat16()], [torch.ones(3).double()]
    assert Sample(half, 10).elements(half).dtype == torch.float32
    assert Sample(double, 10).elements(double).dtype == torch.float64
