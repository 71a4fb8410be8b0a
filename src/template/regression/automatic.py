"""The line trained by Lightning: give the loss, and it does the rest."""

from torch import Tensor

from downslope.tables.batches import Batch
from template.regression.model import LinearRegression


class AutomaticLinearRegression(LinearRegression):
    """Linear regression with Lightning's automatic optimization."""

    def training_step(self, batch: Batch) -> Tensor:
        """Returns the loss, which Lightning takes through zero_grad, backward, clip, step and scheduler."""
        return self.loss(batch)
