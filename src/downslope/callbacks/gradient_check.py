"""Before the first step: is the gradient that training will follow the right one?"""

import logging
import warnings
from typing import Any

from lightning import LightningModule, Trainer

from downslope.steps.due import check_count
from downslope.steps.gradient_check import GradientReport, check
from downslope.steps.loss import Loss, check_loss, said_off, why_no_loss
from downslope.steps.observer import Observer

log = logging.getLogger(__name__)


class WrongGradientError(ValueError):
    """Autograd disagrees with central differences or with forward mode."""


class GradientCheck(Observer):
    """Checks the module's gradient on the first training batch, once; training stays the same to the bit.

    See `downslope.steps.check` for what is compared. It costs about four evaluations of the loss for each
    parameter tensor. Where the loss cannot be had again, one warning says why, and nothing is checked.

    Args:
        on_disagreement: `raise` ends the training before its first step; `warn` says it and continues.
        num_directions: Random directions a parameter.
        seed: Of the directions.
        loss: As for `downslope.steps.loss.BatchLoss`.

    Attributes:
        report: What the check saw; None before it ran.

    Raises:
        ValueError: A setting is out of its range; or, in training, autograd disagrees.
    """

    deliberate = (WrongGradientError,)

    def __init__(
        self, on_disagreement: str = "raise", num_directions: int = 1, seed: int = 0, loss: Loss | None = None
    ) -> None:
        if on_disagreement not in ("raise", "warn"):
            raise ValueError(f"`on_disagreement` must be 'raise' or 'warn', got {on_disagreement!r}.")
        check_loss(loss)
        check_count("num_directions", num_directions)
        self.on_disagreement = on_disagreement
        self.num_directions = num_directions
        self.seed = seed
        self.loss = loss
        self.report: GradientReport | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Checks, once. Not on_train_start: to take a batch there would move the dataloader on."""
        self.listen("on_train_batch_start", when=False)
        if self.report:  # by an earlier fit
            return
        if said_off(trainer, "GradientCheck", why_no_loss(pl_module, self.loss)):
            return
        self.report = check(pl_module, batch, self.loss, self.num_directions, self.seed)
        if self.report.passed:
            log.info("%s", self.report)
        elif self.on_disagreement == "raise":
            raise WrongGradientError(self.report)
        else:
            warnings.warn(str(self.report), stacklevel=2)
