from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from downslope.runs.excess_loss import training_loss


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.dropout = nn.Dropout(0.5)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (self.dropout(self.linear(batch[0])).squeeze(-1) - batch[1]).square().mean()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_loss_over_the_training_rows_is_that_of_numpy_in_float64() -> None:
    module = Line()
    features, target = torch.randn(20, 2), torch.randn(20)
    batches = list(zip(features.split(8), target.split(8), strict=True))  # the last one is smaller
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module.train(), loader)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    weight, bias = (parameter.detach().double().numpy() for parameter in module.parameters())
    error = features.double().numpy() @ weight[0] + bias[0] - target.double().numpy()
    assert training_loss(trainer, module) == pytest.approx((error**2).mean(), rel=1e-12)
    assert module.training
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
