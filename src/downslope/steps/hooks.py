"""Which of a callback's hooks Lightning calls at a step, and which it passes over."""

from lightning import Callback, LightningModule

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def enable(callback: Callback, *names: str, when: bool = True) -> None:
    """Lets Lightning call hooks from now on, or pass them over.

    Lightning enters a profiler for every hook of every callback, also for those that do nothing: 10 µs a step and
    hook. What is not callable it passes over. Only the instance is changed: `super()` finds what it expects.
    """
    for name in names:
        if when:
            vars(callback).pop(name, None)
        else:
            vars(callback)[name] = None


def disable(callback: Callback, *names: str) -> None:
    """Lets Lightning pass hooks over from now on."""
    enable(callback, *names, when=False)


def overrides(module: LightningModule, *hooks: str) -> bool:
    """Tells whether a module has any of Lightning's hooks of its own."""
    return any(getattr(type(module), hook) is not getattr(LightningModule, hook) for hook in hooks)
