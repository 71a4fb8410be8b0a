from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import make_histogram

from downslope.logs.histograms import EDGES, histogram


@given(st.lists(st.floats(-9e19, 9e19) | st.floats(-1e-3, 1e-3) | st.sampled_from(EDGES[1:-1].tolist()), min_size=1))
def test_a_histogram_is_that_of_torch(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    ours, torchs = histogram(tensor), make_histogram(tensor.numpy(), bins=EDGES)
    assert list(ours.bucket) == list(torchs.bucket)
    assert list(ours.bucket_limit) == list(torchs.bucket_limit)
    assert (ours.min, ours.max, ours.num) == (torchs.min, torchs.max, torchs.num)
    assert (ours.sum, ours.sum_squares) == pytest.approx((torchs.sum, torchs.sum_squares))


def test_the_bins_are_those_of_torchs_writer(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    assert EDGES.tolist() == logger.experiment.default_bins
    logger.experiment.close()


def test_what_lies_beyond_the_bins_is_counted_in_the_outermost() -> None:
    values = histogram(torch.tensor([-1e30, 1e25, 1e25, 0.0], dtype=torch.float64))
    assert (values.bucket[1], values.bucket[-1], sum(values.bucket)) == (1, 2, 4)
    assert (values.min, values.max) == (-1e30, 1e25)
