import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn

from template.regression import evaluation
from template.regression.evaluation import evaluate


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.dropout(self.linear(features)).squeeze(-1)


def test_the_figures_are_those_of_numpy_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 8)
    module = Line().train()
    features, target = torch.randn(20, 2), torch.randn(20)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    metrics = evaluate(module, features, target)
    weight, bias = (parameter.detach().double().numpy() for parameter in module.parameters())
    error = features.double().numpy() @ weight[0] + bias[0] - target.double().numpy()
    assert metrics["loss"] == pytest.approx((error**2).mean(), rel=1e-12)
    assert metrics["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-12)
    assert metrics["r2"] == pytest.approx(1 - (error**2).sum() / (20 * target.double().numpy().var()), rel=1e-12)
    assert module.training
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
