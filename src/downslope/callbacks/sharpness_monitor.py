"""How sharply the loss curves, and how near the learning rate is to where plain gradient descent diverges."""

import logging
from typing import Any, Literal, Protocol, runtime_checkable

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from downslope.gradients.curvature import Hessian, largest_eigenvalue
from downslope.logs.tensorboard import write_scalars
from downslope.steps.loss import BatchLoss, Loss, check_loss, copied
from downslope.steps.optimizer_steps import OptimizerStep, OptimizerSteps, leave_out_idle_hooks, wake

log = logging.getLogger(__name__)

COLD_PRODUCTS = 10  # from a random vector: a relative error of 1e-6 and less on MLPs


@runtime_checkable
class HasExactSharpness(Protocol):
    """A module that knows its sharpness without a measurement."""

    def exact_sharpness(self) -> float | None:
        """Returns λ of the loss over all training rows, whatever the parameters; None where it is not known."""
        ...


class SharpnessMonitor(Callback):
    """Logs the largest eigenvalue of the Hessian of the training loss, and what the learning rate makes of it.

    At step t (t optimizer steps taken before it) it writes, of the parameters θₜ that the optimizer holds,
    `curvature/sharpness`, λ, and `learning_rate_effect/stability`, ηλ/2 with η the largest learning rate of the
    optimizer's groups: above 1, plain gradient descent at this η moves away along λ's eigenvector.

    λ is that of one batch: of every process's batch together under DDP, and of the loss without weight decay. By
    default it is the first batch that was measured, kept: as a probe it makes a curve that moves because the parameters
    do. From one training batch of 64 rows to the next λ jumped by ± 10 % where the probe's ran 6 to 8 % above that of
    all rows; three products left an error of 1e-5 on the probe and of 3e-3 on the training batch. Below about 16 rows
    neither is the full data's limit. A module with `exact_sharpness`, such as our linear regression, is asked once, and
    its λ is that of all training rows.

    The loss is computed on copies of parameters and buffers before the step's own batch; training is the same to the
    bit. Where it cannot be had again, one warning says why, and training goes on without.

    Args:
        every_n_steps: Optimizer steps between two measurements. One costs 3 to 6 training steps of a small network,
            the first up to 16.
        num_products: Hessian-vector products a measurement, from the last eigenvector on; the first takes at least 10.
        batch: Measure on the first batch, kept (`probe`), or on the batch of the step (`training`), the first of
            several where gradients are accumulated.
        loss: A function of module and batch, or "training_step" where calling that again has no consequences; the
            module's method `loss(batch)` when None.

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
        for name, value in (("every_n_steps", every_n_steps), ("num_products", num_products)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if batch not in ("probe", "training"):
            raise ValueError(f"`batch` must be 'probe' or 'training', got {batch!r}.")
        self.every_n_steps = every_n_steps
        self.num_products = num_products
        self.batch = batch
        self.loss = loss
        self.sharpness: float | None = None
        self._on = False
        self._loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        probe = getattr(self, "_measured_on", None)
        if not self._on or probe is None or not _is_plain(probe):
            return {}
        return {"probe": copied(probe), "eigenvector": self._eigenvector}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        leave_out_idle_hooks(self)
        self._on = bool(trainer.loggers)
        if not self._on:
            return
        self._steps = OptimizerSteps(trainer, after=self._count)
        self._num_steps = trainer.global_step
        self._measured_at = -1
        loaded = move_data_to_device(self._loaded, pl_module.device)
        self._loaded = {}
        self._measured_on: tuple[Any, int] | None = loaded.get("probe")
        self._eigenvector: Tensor | None = loaded.get("eigenvector")
        self._exact = pl_module.exact_sharpness() if isinstance(pl_module, HasExactSharpness) else None
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # which skips steps that are counted all the same
            self._steps.on_next = self._sleep_till_due

    def _count(self, taken: OptimizerStep) -> None:
        self._num_steps = taken.step + 1

    def _sleep_till_due(self) -> None:
        wake(self, "on_train_batch_start", awake=self._num_steps % self.every_n_steps == 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._on:
            return
        step = max(trainer.global_step, self._num_steps)  # the former stands still for a raw torch optimizer
        if step % self.every_n_steps or step == self._measured_at:
            return
        self._measured_at = step
        try:
            sharpness = self._measure(trainer, pl_module, batch, batch_idx) if self._exact is None else self._exact
            self.sharpness = sharpness
            rate = max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)
            values = {"curvature/sharpness": sharpness, "learning_rate_effect/stability": rate * sharpness / 2}
            write_scalars(trainer, values, step)
        except Exception as error:  # whatever a foreign module meets: watching never ends a training
            self._on = False
            if trainer.is_global_zero:
                log.warning("SharpnessMonitor is off from here on: %s.", _reason(error))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.loggers:
            self._steps.detach()
        self._measured_on = self._eigenvector = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_steps"):
            self._steps.detach()

    def _measure(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> float:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"{len(trainer.optimizers)} optimizers descend on several losses")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(f"{type(trainer.strategy).__name__} does not keep the whole module on each device")
        if self._measured_on is None or self.batch == "training":
            self._measured_on = copied(batch), batch_idx
        kept, kept_index = self._measured_on
        stepped = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
        function = BatchLoss(module, kept, self.loss, kept_index, precise=True)
        with function.measuring():
            leaves = function.leaves(function.parameters)
            theta = [leaves[name] for name, parameter in module.named_parameters() if id(parameter) in stepped]
            hessian = Hessian(function(leaves), theta)

            def product(vector: Tensor) -> Tensor:
                # Every process takes the same products: the mean of theirs is the product of the joint batch.
                mean: Tensor = trainer.strategy.reduce(hessian.product(vector), reduce_op="mean")
                return mean

            if self._eigenvector is None:
                found = largest_eigenvalue(product, hessian.random_direction(), max(self.num_products, COLD_PRODUCTS))
            else:
                found = largest_eigenvalue(product, self._eigenvector, self.num_products)
        self._eigenvector = found.vector
        return found.value


def _is_plain(batch: Any) -> bool:
    """Tells whether a checkpoint may hold a batch: `weights_only=True` reads no class but the plain ones."""
    if isinstance(batch, dict):
        return all(map(_is_plain, batch.values()))
    if type(batch) in (list, tuple):
        return all(map(_is_plain, batch))
    return batch is None or type(batch) in (Tensor, int, float, str, bool)


def _reason(error: Exception) -> str:
    """What went wrong in one line: our own words, or the type and the first line of another's."""
    first_line = str(error).partition("\n")[0].rstrip(".")
    return first_line if type(error) is ValueError else f"{type(error).__name__}: {first_line}"
