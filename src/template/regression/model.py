"""Linear regression y = Wx + b under the mean squared error, trained by Lightning."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

from downslope.gradients.least_squares import LeastSquares, loss_of_lines
from downslope.logs.mean_loss import MeanLoss
from downslope.logs.tensorboard import write_scalars
from downslope.tables.batches import Batch
from template.schedules import schedulers


class LinearRegression(LightningModule):
    """Predicts a number as a weighted sum of features plus a bias.

    Args:
        num_features: Columns of the input; conf leaves it to the data.
        optimizer: Makes the optimizer, given the parameters.
        scheduler: As `template.schedules.schedulers` takes it.
        num_targets: Numbers that are predicted; conf leaves it to the data.
    """

    def __init__(
        self,
        num_features: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: dict[str, Any],
        num_targets: int = 1,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_targets)
        self.make_optimizer = optimizer
        self.lr = getattr(optimizer, "keywords", {}).get("lr")  # where LearningRateFinder looks for it
        self.scheduler = scheduler
        self.train_loss = MeanLoss()
        self.val_metrics = _metrics("val/")
        self.test_metrics = _metrics("test/")

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (rows, columns) to predictions (rows), of several targets (rows, targets)."""
        prediction: Tensor = self.linear(features).squeeze(-1)
        return prediction

    def loss(self, batch: Batch) -> Tensor:
        """Returns the mean squared error over the rows of a batch, (1/N) Σ w (prediction − target)².

        The weight w is 1 unless the data have one. The observers may call it again, so that it does nothing else.
        """
        features, target, *weight = batch
        prediction: Tensor = self(features)
        if weight:
            return (weight[0] * (prediction - target).square()).mean()
        return nn.functional.mse_loss(prediction, target)

    def stacked_loss(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Returns the loss of many lines at once: parameters and result have a leading axis of lines."""
        return loss_of_lines(parameters["linear.weight"], parameters["linear.bias"], *batch)

    def training_step(self, batch: Batch) -> Tensor:
        """Returns the loss, which Lightning takes through zero_grad, backward, clip, step and scheduler."""
        loss = self.loss(batch)
        self.train_loss.update(loss.detach(), weight=len(batch[0]))
        return loss

    def least_squares(self) -> LeastSquares | None:
        """Returns the loss over all training rows in closed form; None for data that do not offer it."""
        return getattr(getattr(self.trainer, "datamodule", None), "least_squares", None)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        """Makes the optimizer, and the scheduler if there is one."""
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], schedulers(self.scheduler, optimizer, self.trainer)

    def on_train_epoch_end(self) -> None:
        """Logs the mean loss over the rows of the epoch."""
        if self.train_loss.update_called:  # a training_step of your own may leave it
            self._log({"train/loss": self.train_loss.compute()})
            self.train_loss.reset()

    def validation_step(self, batch: Batch) -> None:
        """Adds a batch to the validation metrics."""
        self.val_metrics.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, `val/mae` and `val/r2`."""
        self._log(self.val_metrics.compute())
        self.val_metrics.reset()

    def test_step(self, batch: Batch) -> None:
        """Adds a batch to the test metrics."""
        self.test_metrics.update(self(batch[0]), batch[1])

    def on_test_epoch_end(self) -> None:
        """Logs `test/loss`, `test/mae` and `test/r2`."""
        self._log(self.test_metrics.compute())
        self.test_metrics.reset()

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """Returns a column of predictions for each target, in its own unit and under its name."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        columns = data.units.target.undo(self(batch[0]).reshape(len(batch[0]), -1)).T
        return dict(zip(data.target_names, columns, strict=True))

    def _log(self, values: dict[str, Tensor]) -> None:
        # For checkpoints, schedulers and the result. Loggers get them on the x-axis of optimizer steps instead:
        # Lightning's own counts batches.
        self.log_dict(values, logger=False)
        write_scalars(self.trainer, {tag: float(value) for tag, value in values.items()}, self.trainer.global_step)


def _metrics(prefix: str) -> MetricCollection:
    """The loss (mean squared error), the mean absolute error and R², right over batches and processes."""
    metrics: dict[str, Any] = {"loss": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": R2Score()}
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
