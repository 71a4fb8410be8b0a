import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from torch.utils.tensorboard.summary import make_histogram

from downslope.logs.histograms import EDGES, SAMPLE, histogram, num_not_finite, spreads


def made(values: torch.Tensor) -> HistogramProto:
    histo = histogram(spreads([values])[0].numpy())
    assert histo
    return histo


@given(st.lists(st.floats(-9e19, 9e19) | st.floats(-1e-3, 1e-3) | st.sampled_from(EDGES[1:-1].tolist()), min_size=1))
def test_a_histogram_is_that_of_torch(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    ours, torchs = made(tensor), make_histogram(tensor.numpy(), bins=EDGES)
    assert list(ours.bucket) == list(torchs.bucket)
    assert list(ours.bucket_limit) == list(torchs.bucket_limit)
    assert (ours.min, ours.max, ours.num) == (torchs.min, torchs.max, torchs.num)
    assert (ours.sum, ours.sum_squares) == pytest.approx((torchs.sum, torchs.sum_squares))


def test_the_bins_are_those_of_torchs_writer(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    assert EDGES.tolist() == logger.experiment.default_bins
    logger.experiment.close()


def test_what_lies_beyond_the_bins_is_counted_in_the_outermost() -> None:
    values = made(torch.tensor([-1e30, 1e25, 1e25, 0.0], dtype=torch.float64))
    assert (values.bucket[1], values.bucket[-1], sum(values.bucket)) == (1, 2, 4)
    assert (values.min, values.max) == (-1e30, 1e25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_left_out_and_counted(dtype: torch.dtype) -> None:
    values = torch.tensor([math.nan, 2.0, math.inf, -math.inf, 4.0], dtype=dtype)
    counted = made(values)
    assert (counted.min, counted.max, counted.num, counted.sum, counted.sum_squares) == (2.0, 4.0, 2.0, 6.0, 20.0)
    assert num_not_finite(spreads([values])[0].numpy()) == 3
    assert histogram(spreads([torch.full([3], math.nan)])[0].numpy()) is None


def test_many_tensors_at_once_are_as_one_by_one() -> None:
    tensors = [torch.randn(40, 5), torch.tensor(2.0), torch.tensor([1j]), torch.full([3], math.nan)]
    one_by_one = torch.cat([spreads([each]) for each in tensors])
    assert torch.equal(spreads(tensors).nan_to_num(7.0), one_by_one.nan_to_num(7.0))


def test_figures_that_are_missing_are_those_of_the_bins() -> None:
    row = spreads([torch.tensor([2.0, 4.0, 4.0])])[0].numpy()
    row[-4:] = math.nan
    counted = histogram(row)
    assert counted
    assert (counted.num, counted.sum, counted.sum_squares) == (
        3,
        pytest.approx(10, rel=0.05),
        pytest.approx(36, rel=0.1),
    )
    assert 2 / 1.1 <= counted.min <= 2
    assert 4 <= counted.max <= 4 * 1.1


def test_a_large_tensor_is_sampled_evenly_with_figures_of_all() -> None:
    torch.manual_seed(0)
    width = 1024
    values = torch.randn(3 * SAMPLE // width, width) * torch.logspace(-3, 3, width)  # each column another scale
    values[1234, 56], values[-1, -1] = 9e3, -8e3
    flat = values.flatten()
    counted, exact = made(flat), flat.double()
    assert (counted.min, counted.max, counted.num) == (-8e3, 9e3, len(flat))
    assert counted.sum == pytest.approx(float(exact.sum()), abs=1e-7 * float(exact.abs().sum()))
    assert counted.sum_squares == pytest.approx(float(exact.square().sum()), rel=1e-6)
    whole = make_histogram(exact.numpy(), bins=EDGES)
    shares = dict(zip(whole.bucket_limit, whole.bucket, strict=True))
    for limit, count in zip(counted.bucket_limit, counted.bucket, strict=True):
        assert count / len(flat) == pytest.approx(shares.get(limit, 0.0) / len(flat), abs=3e-4)
    assert torch.equal(spreads([flat]), spreads([flat]))
