"""How sharply the loss curves, and how near the learning rate is to where plain gradient descent diverges."""

from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from downslope.gradients.curvature import Hessian, largest_eigenvalue
from downslope.gradients.least_squares import HasLeastSquares
from downslope.gradients.vectors import real
from downslope.logs.tensorboard import write_scalars
from downslope.steps.due import check_count, is_due
from downslope.steps.loss import (
    BatchLoss,
    Loss,
    check_loss,
    copied,
    said_off,
    why_no_loss,
    why_not_one_optimizer,
)
from downslope.steps.observer import Observer
from downslope.steps.optimizer_steps import OptimizerStep, held

COLD_PRODUCTS = 10  # from a random vector: a relative error of 1e-6 and less on MLPs


class SharpnessMonitor(Observer):
    """Logs the largest eigenvalue of the Hessian of the training loss, and what the learning rate makes of it.

    At step t (t optimizer steps taken before it) it writes, of the parameters θₜ that the optimizer holds,
    `curvature/sharpness`, λ, and `learning_rate_effect/stability`, ηλ/2 with η the largest learning rate of the
    optimizer's groups: above 1, plain gradient descent at this η moves away along λ's eigenvector.

    λ is that of one batch: of every process's batch together under DDP, and of the loss without weight decay. By
    default it is the first batch that was measured, kept: as a probe it makes a curve that moves because the parameters
    do. From one training batch of 64 rows to the next λ jumped by ± 10 % where the probe's ran 6 to 8 % above that of
    all rows. Below about 16 rows neither is the full data's limit. A module with `least_squares`, such as our linear
    regression, is asked once, and its λ is that of all training rows.

    Args:
        every_n_steps: Optimizer steps between two measurements. One costs 3 to 6 training steps of a small network,
            the first up to 16.
        num_products: Hessian-vector products a measurement, from the last eigenvector on; the first takes at least 10.
        batch: Measure on the first batch, kept (`probe`), or on the batch of the step (`training`), the first of
            several where gradients are accumulated.
        loss: As for `downslope.steps.loss.BatchLoss`.

    Attributes:
        sharpness: λ, as measured last; None before.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        num_products: int = 3,
        batch: Literal["probe", "training"] = "probe",
        loss: Loss | None = None,
    ) -> None:
        check_loss(loss)
        check_count("every_n_steps", every_n_steps)
        check_count("num_products", num_products)
        if batch not in ("probe", "training"):
            raise ValueError(f"`batch` must be 'probe' or 'training', got {batch!r}.")
        self.every_n_steps = every_n_steps
        self.num_products = num_products
        self.batch = batch
        self.loss = loss
        self.sharpness: float | None = None
        self.reset()

    def reset(self) -> None:
        self._measured_on: tuple[Any, int] | None = None
        self._eigenvector: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        if self._measured_on is None or not _is_plain(self._measured_on):
            return {}
        return {"probe": copied(self._measured_on), "eigenvector": self._eigenvector}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measured_on, self._eigenvector = state_dict["probe"], state_dict["eigenvector"]

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.loggers:
            self.listen_only()
            return
        self._measured_on, self._eigenvector = move_data_to_device(
            (self._measured_on, self._eigenvector), module.device
        )
        line = module.least_squares() if isinstance(module, HasLeastSquares) else None
        self._exact = None if line is None else line.sharpness
        if self._exact is None and said_off(trainer, "curvature/sharpness", _why_not(trainer, module, self.loss)):
            self.listen_only()
            return
        self._num_steps, self._measured_at = trainer.global_step, -1
        steps = self.follow(trainer, after=self._count)
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # which skips steps that are counted all the same
            steps.on_next = self.guarded(self._sleep_till_due)

    def _count(self, taken: OptimizerStep) -> None:
        self._num_steps = taken.step + 1

    def _sleep_till_due(self) -> None:
        self.listen("on_train_batch_start", when=is_due(self._num_steps, self.every_n_steps))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = max(trainer.global_step, self._num_steps)  # the former stands still for a raw torch optimizer
        if not is_due(step, self.every_n_steps) or step == self._measured_at:
            return
        self._measured_at = step
        self.sharpness = self._measure(trainer, pl_module, batch, batch_idx) if self._exact is None else self._exact
        values = {"curvature/sharpness": self.sharpness}
        groups = trainer.optimizers[0].param_groups
        if rates := [float(group["lr"]) for group in groups if group.get("lr") is not None]:
            values["learning_rate_effect/stability"] = max(rates) * self.sharpness / 2
        write_scalars(trainer, values, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reset()

    def _measure(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> float:
        if self._measured_on is None or self.batch == "training":
            self._measured_on = copied(batch), batch_idx
        kept, kept_index = self._measured_on
        function = BatchLoss(module, kept, self.loss, kept_index, precise=True)
        with function.measuring():
            leaves: dict[str, Tensor] = function.leaves(function.parameters)
            theta = []
            moving = set(function.names(held(trainer.optimizers)))
            for name in [name for name in leaves if name in moving]:
                leaf = leaves[name]
                if leaf.is_complex():  # λ is that of the loss as a function of real and imaginary parts
                    leaf = real(leaf.detach()).requires_grad_(leaf.requires_grad)
                    leaves[name] = torch.complex(*leaf.unbind(-1))
                theta.append(leaf)
            loss = function(leaves)
            hessian = Hessian(loss, theta)
            if not loss.requires_grad:  # λ would be 0: perhaps it is a `loss(predictions, target=None)`
                raise ValueError("the loss does not depend on any parameter, so it cannot be the loss of a batch")

            def product(vector: Tensor) -> Tensor:
                # Every process takes the same products: the mean of theirs is the product of the joint batch.
                mean: Tensor = trainer.strategy.reduce(hessian.product(vector), reduce_op="mean")
                return mean

            start, num_products = self._eigenvector, self.num_products
            if start is None or len(start) != hessian.num_rows:  # parameters were frozen until now
                start, num_products = hessian.random_direction(), max(num_products, COLD_PRODUCTS)
            found = largest_eigenvalue(product, start, num_products)
        self._eigenvector = found.vector
        return found.value


def _why_not(trainer: Trainer, module: LightningModule, loss: Loss | None) -> str | None:
    """Why there is no Hessian of one loss, None where there is."""
    if reason := why_not_one_optimizer(trainer):
        return reason
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        return f"{type(trainer.strategy).__name__} does not keep the whole module on each device"
    return why_no_loss(module, loss)


def _is_plain(batch: Any) -> bool:
    """Tells whether a checkpoint may hold a batch: `weights_only=True` reads no class but the plain ones."""
    if isinstance(batch, dict):
        return all(map(_is_plain, batch.values()))
    if type(batch) in (list, tuple):
        return all(map(_is_plain, batch))
    return batch is None or type(batch) in (Tensor, int, float, str, bool)
