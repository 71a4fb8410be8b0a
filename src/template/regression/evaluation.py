"""How good the weights are: loss, mean absolute error and R² on rows, in float64."""

from collections.abc import Mapping

import torch
from lightning import LightningModule
from torch import Tensor
from torch.func import functional_call
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

ROWS_AT_ONCE = 65_536


def regression_metrics(prefix: str = "", sync_on_compute: bool = True) -> MetricCollection:
    """Returns the loss (mean squared error), the mean absolute error and R², right over batches and processes."""
    return MetricCollection(
        {
            "loss": MeanSquaredError(sync_on_compute=sync_on_compute),
            "mae": MeanAbsoluteError(sync_on_compute=sync_on_compute),
            "r2": R2Score(sync_on_compute=sync_on_compute),
        },
        prefix=prefix,
        compute_groups=False,
    )


@torch.no_grad()
def evaluate(module: LightningModule, features: Tensor, target: Tensor) -> dict[str, float]:
    """Returns `loss` (mean squared error), `mae` and `r2` of a module's predictions, computed in float64 on the CPU.

    So the figures are those of the weights alone, to 1e-15, whatever device and precision trained them, and can
    be compared with the closed form. The module is left as it was; every process computes all of it.

    Args:
        module: Maps features to predictions.
        features: One row a sample.
        target: One value a row.
    """
    metrics = regression_metrics(sync_on_compute=False).set_dtype(torch.float64)
    state = {
        name: tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.detach().cpu()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    was_training = module.training
    module.eval()
    for inputs, outputs in zip(features.split(ROWS_AT_ONCE), target.split(ROWS_AT_ONCE), strict=True):
        metrics.update(functional_call(module, state, (inputs.double(),)), outputs.double())
    module.train(was_training)
    return {name: float(value) for name, value in metrics.compute().items()}


def evaluate_parts(module: LightningModule, parts: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Returns what `evaluate` says of each part of the rows, by tag: `train/loss`, `val/mae` and so on.

    Args:
        module: Maps features to predictions.
        parts: Features and target of each.
    """
    return {f"{part}/{name}": value for part, rows in parts.items() for name, value in evaluate(module, *rows).items()}
