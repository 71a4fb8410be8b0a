"""The mean loss over the rows of an epoch."""

from torch import Tensor
from torchmetrics import MeanMetric


class MeanLoss(MeanMetric):
    """Adds up the losses of batches, each as often as it has rows; over all processes, and after a resume, too.

    A loss that is not a number is to be seen: `MeanMetric` leaves it out, or looks for it at every step, which takes
    longer than a small model's forward.

    Example:
        >>> import torch
        >>> mean = MeanLoss()
        >>> mean.update(torch.tensor(1.0), weight=3)
        >>> mean.update(torch.tensor(5.0), weight=1)
        >>> mean.compute()
        tensor(2.)
    """

    def update(self, value: Tensor, weight: int) -> None:  # type: ignore[override]  # tensors and rows alone
        """Takes the mean loss of a batch, one number, and its rows."""
        self.mean_value.add_(value.reshape(()), alpha=weight)
        self.weight.add_(weight)
