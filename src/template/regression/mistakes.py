"""The classic mistakes, one class each, for teaching: the cycle of `manual.py` with one thing wrong.

`experiment=missing_zero_grad` and its siblings train them; what the observers show is the mistake's own signature.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from downslope.tables.batches import Batch
from template.regression.manual import ManualLinearRegression


class MissingZeroGrad(ManualLinearRegression):
    """Never forgets a gradient: each step follows the sum of all gradients so far, and swings for ever."""

    def training_step(self, batch: Batch) -> Tensor:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        # MISTAKE: `optimizer.zero_grad()` is missing here; backward() adds to what lies in .grad.
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.train_loss.update(loss.detach(), weight=len(batch[0]))
        return loss

    def on_validation_model_zero_grad(self) -> None:
        """Keeps them: Lightning forgets gradients before a validation, which would heal one batch an epoch."""


class DetachedGraph(ManualLinearRegression):
    """Cuts the loss off from the parameters, then silences the error that says so: no gradient arrives."""

    def training_step(self, batch: Batch) -> Tensor:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        # MISTAKE: detach() drops the record that backward() would walk; requires_grad_() hides that it is gone.
        loss = self.loss(batch).detach().requires_grad_()
        self.manual_backward(loss)
        optimizer.step()
        self.train_loss.update(loss.detach(), weight=len(batch[0]))
        return loss


class FrozenParameter(ManualLinearRegression):
    """Trains the bias alone: the weights were frozen and never thawed."""

    def __init__(
        self,
        num_features: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: dict[str, Any],
        gradient_clip_val: float | None = None,
    ) -> None:
        super().__init__(num_features, optimizer, scheduler, gradient_clip_val)
        # MISTAKE: autograd passes over a parameter that requires no gradient.
        self.linear.weight.requires_grad_(False)


class UnnormalisedAccumulation(ManualLinearRegression):
    """Adds up the gradients of `NUM_PARTS` parts of a batch without dividing: as if the rate were that much larger."""

    NUM_PARTS = 6

    def training_step(self, batch: Batch) -> Tensor:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        losses = []
        for part in zip(*(rows.chunk(self.NUM_PARTS) for rows in batch), strict=True):
            loss = self.loss(Batch(part))
            # MISTAKE: should be `loss / NUM_PARTS`; a sum of means is not the mean.
            self.manual_backward(loss)
            losses.append(loss.detach())
        optimizer.step()
        loss = torch.stack(losses).mean()
        self.train_loss.update(loss, weight=len(batch[0]))
        return loss


class DeadReLU(ManualLinearRegression):
    """One hidden layer of eight units, all of which start so far below zero that no row ever wakes one."""

    NUM_UNITS = 8

    def __init__(
        self,
        num_features: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: dict[str, Any],
        gradient_clip_val: float | None = None,
    ) -> None:
        super().__init__(num_features, optimizer, scheduler, gradient_clip_val)
        self.hidden = nn.Linear(num_features, self.NUM_UNITS)
        self.linear = nn.Linear(self.NUM_UNITS, 1)
        # MISTAKE: where a unit's input is negative, ReLU is flat: its slope is 0, and so are all gradients behind it.
        nn.init.constant_(self.hidden.bias, -20.0)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (rows, columns) to predictions (rows)."""
        prediction: Tensor = self.linear(self.hidden(features).relu()).squeeze(-1)
        return prediction

    def least_squares(self) -> None:
        """Has none: this is no line."""
