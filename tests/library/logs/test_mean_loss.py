import math

import pytest
import torch
from torchmetrics import MeanMetric

from downslope.logs.mean_loss import MeanLoss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchmetrics_weighted_mean(dtype: torch.dtype) -> None:
    ours, theirs = MeanLoss(), MeanMetric()
    for number, loss in enumerate(torch.rand(20, generator=torch.Generator().manual_seed(0)).to(dtype), start=1):
        ours.update(loss, weight=number)
        theirs.update(loss.float(), weight=number)
    assert ours.compute() == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_a_loss_that_is_not_a_number_is_seen_and_one_of_shape_1_is_a_number() -> None:
    mean = MeanLoss()
    mean.update(torch.tensor([2.0]), weight=3)
    assert mean.compute() == 2.0
    mean.update(torch.tensor(math.nan), weight=1)
    assert math.isnan(mean.compute())
    mean.reset()
    mean.update(torch.tensor(1.0), weight=1)
    assert mean.compute() == 1.0
