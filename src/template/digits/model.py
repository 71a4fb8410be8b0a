"""A network with one hidden layer that tells which digit an image shows."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from downslope.logs.mean_loss import MeanLoss
from template.digits.data import Batch
from template.schedules import schedulers


class DigitClassifier(LightningModule):
    """Gives each class a score; the largest one is the answer.

    Args:
        num_features: Pixels of an image.
        num_classes: Answers to choose from.
        num_hidden: Units of the hidden layer.
        optimizer: Makes the optimizer, given the parameters.
        scheduler: As `template.schedules.schedulers` takes it.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        num_hidden: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(num_features, num_hidden), nn.ReLU(), nn.Linear(num_hidden, num_classes)
        )
        self.make_optimizer = optimizer
        self.lr = getattr(optimizer, "keywords", {}).get("lr")  # where LearningRateFinder looks for it
        self.scheduler = scheduler
        # They add up over an epoch, its batches and processes; a checkpoint keeps them, so that an epoch resumed in
        # its middle ends with the right mean.
        self.train_loss = MeanLoss()
        self.held_out_loss = MeanLoss()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")  # over images, not over classes

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (rows, 8, 8) to scores (rows, classes)."""
        scores: Tensor = self.network(images)
        return scores

    def loss(self, batch: Batch) -> Tensor:
        """Returns the mean cross-entropy, −(1/N) Σ log softmax(scores)[digit].

        It logs nothing and keeps nothing: observers may ask for it again, to see what a step has done.
        """
        images, digits = batch
        return cross_entropy(self(images), digits)

    def training_step(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        self.train_loss.update(loss.detach(), weight=len(batch[1]))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch) -> None:
        self._log_held_out("val", batch)

    def test_step(self, batch: Batch) -> None:
        self._log_held_out("test", batch)

    def _log_held_out(self, part: str, batch: Batch) -> None:
        images, digits = batch
        scores = self(images)
        self.held_out_loss.update(cross_entropy(scores, digits), weight=len(digits))
        self.accuracy.update(scores, digits)
        self.log_dict({f"{part}/loss": self.held_out_loss, f"{part}/accuracy": self.accuracy})

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the columns that scripts/predict.py writes."""
        images, digits = batch
        probability, prediction = self(images).softmax(dim=1).max(dim=1)
        return {"digit": digits, "prediction": prediction, "probability": probability}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], schedulers(self.scheduler, optimizer, self.trainer)
