"""The model of your_task."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from downslope.logs.mean_loss import MeanLoss
from template.schedules import schedulers

Batch = tuple[Tensor, Tensor]  # what your data serve: features (rows, columns) and target (rows)


class YourTaskModel(LightningModule):
    """Predicts a number from features.

    Args:
        num_features: Columns of the input; where conf leaves it out, the attribute of the data.
        num_hidden: Units of the hidden layer.
        optimizer: Makes the optimizer, given the parameters.
        scheduler: Makes the learning-rate scheduler, and says when it steps; see conf/scheduler.
    """

    def __init__(
        self,
        num_features: int,
        num_hidden: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: dict[str, Any],
    ) -> None:
        super().__init__()
        # Your network.
        self.network = nn.Sequential(nn.Linear(num_features, num_hidden), nn.Tanh(), nn.Linear(num_hidden, 1))
        self.make_optimizer = optimizer
        self.lr = getattr(optimizer, "keywords", {}).get("lr")  # where LearningRateFinder looks for it
        self.scheduler = scheduler
        self.train_loss = MeanLoss()  # of an epoch, right after a resume too

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (rows, columns) to predictions (rows)."""
        prediction: Tensor = self.network(features).squeeze(-1)
        return prediction

    def loss(self, batch: Batch) -> Tensor:
        """Returns the mean squared error: your loss. It logs nothing, since observers may ask for it again."""
        features, target = batch
        return mse_loss(self(features), target)

    def training_step(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        self.train_loss.update(loss.detach(), weight=len(batch[1]))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch) -> None:
        # Your metrics: whatever is logged here stands in the dashboard, the result and a sweep's table.
        self.log("val/loss", self.loss(batch), batch_size=len(batch[1]), sync_dist=True)

    def test_step(self, batch: Batch) -> None:
        self.log("test/loss", self.loss(batch), batch_size=len(batch[1]), sync_dist=True)

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the columns that scripts/predict.py writes."""
        features, target = batch
        return {"target": target, "prediction": self(features)}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], schedulers(self.scheduler, optimizer, self.trainer)
