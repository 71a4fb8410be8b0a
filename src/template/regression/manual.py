"""The line trained by hand: the cycle that Lightning hides, written out."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from downslope.tables.batches import Batch
from template.regression.model import LinearRegression


class ManualLinearRegression(LinearRegression):
    """Linear regression with manual optimization.

    Args:
        num_features: As for `LinearRegression`.
        optimizer: As for `LinearRegression`.
        scheduler: As for `LinearRegression`.
        gradient_clip_val: Largest L2 norm of the gradient that the step may use; None does not clip.
        num_targets: As for `LinearRegression`.
    """

    def __init__(
        self,
        num_features: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: dict[str, Any],
        gradient_clip_val: float | None = None,
        num_targets: int = 1,
    ) -> None:
        if getattr(optimizer, "func", None) is LBFGS:
            raise ValueError(
                "Cannot train `model=manual` with `optimizer=lbfgs`. This is because LBFGS takes many gradients a "
                "step, and the cycle that is written out takes one: use `model=automatic`."
            )
        super().__init__(num_features, optimizer, scheduler, num_targets)
        self.automatic_optimization = False
        self.gradient_clip_val = gradient_clip_val

    def training_step(self, batch: Batch) -> Tensor:
        """One step of gradient descent, from top to bottom; returns the loss for observers to see."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)

        # 1. Forget the last step's gradients: backward() would add to them.
        optimizer.zero_grad()
        # 2. Forward: predict, compare, and record how the loss came about.
        loss = self.loss(batch)
        # 3. Backward: walk that record back, and leave d loss / d parameter in each parameter's .grad.
        self.manual_backward(loss)
        # 4. Shorten a gradient that is too long, if asked to.
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer.optimizer, gradient_clip_val=self.gradient_clip_val)
        # 5. Step downhill: parameter(t+1) = parameter(t) − learning rate × gradient(t), for plain SGD.
        optimizer.step()
        # 6. Let the schedule choose the next learning rate.
        self._step_scheduler("step")
        self.train_loss.update(loss.detach(), weight=len(batch[0]))
        return loss

    def on_train_epoch_end(self) -> None:
        """Ends the epoch as automatic optimization does: the mean loss, then the schedule."""
        super().on_train_epoch_end()
        self._step_scheduler("epoch")

    def _step_scheduler(self, interval: str) -> None:
        if self.scheduler.get("interval") != interval or (scheduler := self.lr_schedulers()) is None:
            return
        if interval == "epoch" and (self.current_epoch + 1) % self.scheduler.get("frequency", 1):
            return
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(self.trainer.callback_metrics[self.scheduler["monitor"]])
        else:
            assert isinstance(scheduler, LRScheduler)
            scheduler.step()

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        """Makes the same, but for the scheduler alone: the cycle above steps it."""
        optimizers, schedules = super().configure_optimizers()
        return optimizers, [schedule["scheduler"] for schedule in schedules]
