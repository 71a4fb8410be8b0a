"""The gradient that arrives at an optimizer step, before anybody clips it."""

from collections.abc import Callable, Iterable

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from downslope.gradients.vectors import clones
from downslope.steps.optimizer_steps import OptimizerStep, OptimizerSteps, held, overrides


class UnclippedGradients:
    """Keeps a copy of the gradients: accumulated, unscaled, all-reduced, not clipped.

    With automatic optimization Lightning calls `on_before_optimizer_step` at just that point. With manual optimization
    it calls it after the user's own clipping, and the last moment before is when backward has added to `.grad`: that
    is caught parameter by parameter, because a plain `loss.backward()` tells Lightning nothing, and once more in
    `on_after_backward`, when several processes have taken their mean.

    Args:
        trainer: Whose precision may scale the loss.
        module: Decides by its mode of optimization.
        steps: Of all optimizers; those that are not due cost next to nothing.
        guarded: Makes a function one that does not raise.

    Attributes:
        are_applied: Nobody clips: they are taken from `.grad` after the step, and nothing is copied.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        steps: OptimizerSteps,
        guarded: Callable[[Callable[..., None]], Callable[..., None]],
    ) -> None:
        self._trainer = trainer
        self._manual = not module.automatic_optimization
        self._steps = steps
        self.are_applied = not may_be_clipped(trainer, module)
        self._copies: dict[Tensor, Tensor] = {}
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._hook = guarded(lambda parameter: self._keep([parameter]))

    def watch(self) -> None:
        """Begins to look, or stops, as the coming steps ask for, with manual optimization.

        To be called when a step has been taken, and when a batch begins: a module may have grown.
        """
        if self._manual and not self._steps.are_due():
            self.detach()
        for parameter in held(self._trainer.optimizers) if self._manual and self._steps.are_due() else ():
            if parameter not in self._handles and parameter.requires_grad:
                self._handles[parameter] = parameter.register_post_accumulate_grad_hook(self._hook)

    def _keep(self, parameters: Iterable[Tensor]) -> None:
        present = {each: each.grad for each in parameters if each.grad is not None}
        self._copies |= zip(present, clones([*present.values()]), strict=True)

    def on_after_backward(self) -> None:
        """Takes the mean over processes instead of this one's own gradients."""
        if self._manual and self._trainer.world_size > 1:
            self._keep(self._copies)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Copies the gradients of an optimizer whose step is due, with automatic optimization."""
        if not self._manual:
            self._copies.clear()
            self._keep(held([optimizer]))

    def take(self, state: OptimizerStep) -> dict[Tensor, Tensor]:
        """Returns the copies for the step that an optimizer has just taken, and forgets them.

        A parameter without a gradient by now is left out: its copy belongs to an earlier step.
        """
        scaler = getattr(self._trainer.precision_plugin, "scaler", None) if self._manual else None
        scale = scaler.get_scale() if scaler is not None else 1.0
        taken = [each for each in state.parameters if each in self._copies and each.grad is not None]
        copies: dict[Tensor, Tensor] = {each: self._copies.pop(each) for each in taken}
        return copies if scale == 1.0 else {each: copy / scale for each, copy in copies.items()}

    def detach(self) -> None:
        """Leaves the parameters as they were."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._copies.clear()


def may_be_clipped(trainer: Trainer, module: LightningModule) -> bool:
    """Tells whether a gradient may be changed between its arrival and the step, or by the step.

    With manual optimization it always may; with automatic, by the Trainer's setting, by a hook of the module or of
    somebody's callback, or by an optimizer that is not torch's own.
    """
    hooks = ("configure_gradient_clipping", "on_before_optimizer_step", "optimizer_step")
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    looks = {type(each).on_before_optimizer_step for each in callbacks} - {Callback.on_before_optimizer_step}
    return (
        not module.automatic_optimization
        or getattr(trainer.precision_plugin, "scaler", None) is not None
        or trainer.gradient_clip_val is not None
        or overrides(module, *hooks)
        or any(not look.__module__.startswith("downslope.") for look in looks)
        or any(not type(each).__module__.startswith("torch.optim.") for each in trainer.optimizers)
    )
