"""Linear regression y = Wx + b under the mean squared error: what both ways of training share."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanSquaredError

from downslope.gradients.least_squares import LeastSquares
from downslope.logs.tensorboard import write_scalars
from downslope.tables.batches import Batch
from template.regression.data import DataModule
from template.regression.evaluation import regression_metrics


class LinearRegression(LightningModule):
    """Predicts a number as a weighted sum of features plus a bias.

    Args:
        num_features: Columns of the input.
        optimizer: Makes the optimizer, given the parameters.
        scheduler: `scheduler` makes the learning-rate scheduler, given the optimizer (None keeps the rate);
            `interval` is when it steps, `epoch` or `step`; `monitor` is the metric that a plateau is seen in.
    """

    def __init__(
        self,
        num_features: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: dict[str, Any],
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, 1)
        self.make_optimizer = optimizer
        self.scheduler = scheduler
        self.train_loss = MeanSquaredError()  # a MeanMetric would pass over NaN
        self.val_metrics = regression_metrics("val/")

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (rows, columns) to predictions (rows)."""
        prediction: Tensor = self.linear(features).squeeze(-1)
        return prediction

    def loss(self, batch: Batch) -> Tensor:
        """Returns the mean squared error over the rows of a batch, (1/N) Σ (prediction − target)²."""
        features, target = batch
        prediction = self(features)
        self.train_loss.update(prediction.detach(), target)
        return nn.functional.mse_loss(prediction, target)

    def least_squares(self) -> LeastSquares | None:
        """Returns the loss over all training rows in closed form; None for others' data."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return datamodule.least_squares if isinstance(datamodule, DataModule) else None

    def exact_sharpness(self) -> float | None:
        """Returns λ of the loss over all training rows, which their features alone decide; None for others' data."""
        line = self.least_squares()
        return None if line is None else line.sharpness

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        """Makes the optimizer, and the scheduler if there is one."""
        optimizer = self.make_optimizer(self.parameters())
        make_scheduler = self.scheduler["scheduler"]
        return [optimizer], [] if make_scheduler is None else [self.schedule(make_scheduler(optimizer))]

    def schedule(self, scheduler: LRScheduler) -> LRScheduler | LRSchedulerConfigType:
        """Returns what Lightning is to know of the scheduler: when to step it, and by which metric."""
        return {"scheduler": scheduler, "interval": self.scheduler["interval"], "monitor": self.scheduler["monitor"]}

    def on_train_epoch_end(self) -> None:
        """Logs the mean loss over the rows of the epoch."""
        self._log({"train/loss": self.train_loss.compute()})
        self.train_loss.reset()

    def validation_step(self, batch: Batch) -> None:
        """Adds a batch to the validation metrics."""
        self.val_metrics.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, `val/mae` and `val/r2`."""
        self._log(self.val_metrics.compute())
        self.val_metrics.reset()

    def _log(self, values: dict[str, Tensor]) -> None:
        # Callbacks and schedulers may monitor them. To the loggers they go on the x-axis of optimizer steps, which
        # Lightning's own counts in batches.
        self.log_dict(values, logger=False)
        write_scalars(self.trainer, {tag: float(value) for tag, value in values.items()}, self.global_step)
