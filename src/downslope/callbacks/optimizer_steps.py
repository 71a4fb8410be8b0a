"""Around every optimizer step, in every mode: where θₜ and θₜ₊₁ can be read, and the gradient between them."""

from collections.abc import Callable
from dataclasses import dataclass

from lightning import Callback, LightningModule, Trainer
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


@dataclass
class OptimizerStep:
    """One optimizer's coming or just taken step.

    Attributes:
        optimizer: torch's own, also where Lightning wraps it.
        name: Its class, with its place where several of one class are there: `Adam`, `Adam-1`.
        step: t, the optimizer steps taken before this one by all optimizers together: the x-axis.
        count: The steps taken before this one by this optimizer.
        suffix: What tells its tags from those of the other optimizers: `/Adam-1`, or nothing where it is alone.
    """

    optimizer: Optimizer
    name: str
    step: int
    count: int
    suffix: str

    @property
    def parameters(self) -> list[Parameter]:
        """What it steps, each once."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class OptimizerSteps:
    """Calls a function before, and one after, each step that an optimizer of the trainer really takes.

    torch's own hooks, because Lightning's differ by mode: with automatic optimization `before` runs before the closure,
    so that gradients are still stale, and `after` when clipping and unscaling are done. With a raw torch optimizer
    Lightning's are not called at all, and `global_step` stands still: then the steps are counted here. A step that a
    GradScaler skips calls only Lightning's counter, neither function.

    Args:
        trainer: Its optimizers are set up: from `on_train_start` on.
        before: Called with θₜ in place.
        after: Called with θₜ₊₁ in place, and in `.grad` the gradient that was applied.
    """

    def __init__(
        self,
        trainer: Trainer,
        before: Callable[[OptimizerStep], None] | None = None,
        after: Callable[[OptimizerStep], None] | None = None,
    ) -> None:
        self._trainer = trainer
        self._before = before
        self._after = after
        self._num_steps = trainer.global_step
        self.on_next: Callable[[], None] | None = None
        self._handles: list[RemovableHandle] = []
        alone = len(trainer.optimizers) == 1
        self.states = [
            OptimizerStep(optimizer, name, 0, trainer.global_step if alone else 0, "" if alone else f"/{name}")
            for optimizer, name in zip(trainer.optimizers, optimizer_names(trainer.optimizers), strict=True)
        ]
        for state in self.states:
            self._attach(state)

    def _attach(self, state: OptimizerStep) -> None:
        def before(*_: object) -> None:
            state.step = max(self._trainer.global_step, self._num_steps)
            if self._before:
                self._before(state)

        def after(*_: object) -> None:
            if self._after:
                self._after(state)
            self._num_steps = state.step + 1
            state.count += 1
            if self.on_next:
                self.on_next()

        self._handles.append(state.optimizer.register_step_pre_hook(before))
        self._handles.append(state.optimizer.register_step_post_hook(after))

    def detach(self) -> None:
        """Leaves the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def optimizer_names(optimizers: list[Optimizer]) -> list[str]:
    """Returns each optimizer's class name, numbered from the second of a class on: `Adam`, `Adam-1`."""
    names: list[str] = []
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        place = sum(type(other).__name__ == kind for other in optimizers[: len(names)])
        names.append(f"{kind}-{place}" if place else kind)
    return names


STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def leave_out_idle_hooks(callback: Callback) -> None:
    """Spares the hooks of a step that a callback has no use for.

    Lightning enters a profiler for every hook of every callback, also for those that do nothing: 15 µs a step and
    callback. What is not callable it passes over. Only the instance is changed: `super()` finds what it expects.
    """
    for name in STEP_HOOKS:
        if getattr(type(callback), name) is getattr(Callback, name):
            vars(callback)[name] = None


def check_frequency(name: str, value: int) -> None:
    """Refuses a number of steps between two measurements that is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def parameter_names(module: LightningModule) -> dict[int, str]:
    """Returns the name of each parameter by its id, a tied one once, without what `torch.compile` puts in between."""
    return {id(parameter): name.replace("_orig_mod.", "") for name, parameter in module.named_parameters()}
