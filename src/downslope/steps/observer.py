"""The life cycle of all observers: attach, measure when due, detach; and a failure costs the observer alone."""

import logging
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer

from downslope.steps.optimizer_steps import OptimizerStep, OptimizerSteps

log = logging.getLogger(__name__)

HOOKS = {name for name, hook in vars(Callback).items() if callable(hook) and not name.startswith("_")}
SHARDING = {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"}  # Lightning's, by name: to import takes long
IN_TRAINING = ("on_train", "on_before", "on_after", "on_validation")
STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Observer(Callback):
    """A callback that watches training and never changes it.

    A subclass overrides `reset`, `attach`, `detach`, and those of Lightning's hooks that it measures in. They run
    between `on_train_start` and the end alone: `teardown`, or an exception. Whatever `attach` or a hook of training
    assigns for the first time, and `__init__` does not, belongs to the run and goes with it: so a fitted Trainer can be
    pickled.

    Every hook, and every function given to `follow`, is guarded here: an `Exception` in it is one warning, and this
    observer is off until the next fit. Those of `deliberate` pass.

    Attributes:
        is_off: Whether it failed.
    """

    deliberate: ClassVar[tuple[type[Exception], ...]] = ()
    is_off = False
    _is_attached = False
    _kept: frozenset[str] = frozenset()
    _followed: tuple[OptimizerSteps, ...] = ()

    def __init_subclass__(cls) -> None:
        for name in HOOKS & vars(cls).keys():
            setattr(cls, name, _guarded(vars(cls)[name]))

    def reset(self) -> None:
        """Forgets the last fit: a fit begins, and a checkpoint's state is still to come."""

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Begins to watch: optimizers are set up, and the first batch is still to come."""

    def detach(self) -> None:
        """Ends what has to be ended: what `follow` returned is already."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.is_off = False
            self.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        self._kept = frozenset([*vars(self), "_kept", "is_off"])
        self.listen_only(*(name for name in STEP_HOOKS if getattr(type(self), name) is not getattr(Callback, name)))
        if sharding := SHARDING & {each.__name__ for each in type(trainer.strategy).__mro__}:
            raise ValueError(f"under {min(sharding)} each process holds only a part of every parameter")
        self._is_attached = True
        self.attach(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def listen(self, *hooks: str, when: bool = True) -> None:
        """Lets Lightning call hooks of a step from now on, or pass them over.

        Lightning enters a profiler for every hook of every callback, also for those that do nothing: 10 µs a step and
        hook. What is not callable it passes over. Only the instance is changed: `super()` finds what it expects.
        """
        for name in hooks:
            if when:
                vars(self).pop(name, None)
            else:
                vars(self)[name] = None

    def listen_only(self, *hooks: str) -> None:
        """Lets Lightning call these hooks of a step, and pass over the others."""
        self.listen(*STEP_HOOKS, when=False)
        self.listen(*hooks)

    def follow(
        self,
        trainer: Trainer,
        before: Callable[[OptimizerStep], None] | None = None,
        after: Callable[[OptimizerStep], None] | None = None,
        due: Callable[[int], bool] | None = None,
    ) -> OptimizerSteps:
        """Returns the steps of the trainer's optimizers, whose functions are guarded, and which end with the run."""
        steps = OptimizerSteps(trainer, before and self.guarded(before), after and self.guarded(after), due)
        self._followed = (*self._followed, steps)
        return steps

    def guarded(self, function: Callable[..., None]) -> Callable[..., None]:
        """Returns the function as it is called from anywhere but a hook: its failure is this observer's."""

        def call(*arguments: Any) -> None:
            if not self.is_off:
                self._attempt(function, *arguments)

        return call

    def _attempt(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except self.deliberate:
            raise
        except Exception as error:
            self.fail(error)

    def restored(self, load: Callable[[Any], None], state: Any) -> bool:
        """Tells whether a state from a checkpoint could be taken over; else the observer begins anew, and says so."""
        try:
            load(state)
        except Exception as error:
            log.warning("%s starts over: its state in the checkpoint has a different layout.", type(self).__name__)
            log.debug("%s could not be restored", type(self).__name__, exc_info=error)
            return False
        return True

    def fail(self, error: Exception) -> None:
        """Says why, once, and watches no more."""
        if not self.is_off:
            self.is_off = True
            say_off(type(self).__name__, error)
            self._end()
            self.listen_only()

    def _end(self) -> None:
        if not self._is_attached:
            return
        self._is_attached = False
        for steps in self._followed:
            steps.detach()
        self._attempt(self.detach)
        for name in vars(self).keys() - self._kept:
            delattr(self, name)


def _guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that is called while its observer watches, and whose failure is that observer's alone."""
    loads = hook.__name__ == "load_state_dict"
    in_training = hook.__name__.startswith(IN_TRAINING) and hook.__name__ != "on_train_start"
    begins = hook.__name__ == "setup"

    @wraps(hook)
    def call(self: Observer, *arguments: Any, **named: Any) -> Any:
        if (self.is_off and not begins) or (in_training and not self._is_attached):
            return None
        if loads:
            return self.restored(partial(hook, self), *arguments, **named)
        return self._attempt(hook, self, *arguments, **named)

    return call


for _name in HOOKS & vars(Observer).keys():
    setattr(Observer, _name, _guarded(vars(Observer)[_name]))


def say_off(what: str, error: Exception) -> None:
    """Warns that an observer, or one of its measurements, is off, in one line; a log at level DEBUG has more.

    Args:
        what: The observer's name, or the tag of what is measured no more.
        error: Why: a `ValueError` speaks for itself, of others the type is named.
    """
    first_line = str(error).partition("\n")[0].rstrip(".")
    reason = first_line if type(error) is ValueError else f"{type(error).__name__}: {first_line}"
    # A full disk as it is: of several who meet it the terminal shows the first.
    log.warning("%s is off from here on: %s.", what, error if isinstance(error, OSError) else reason)
    log.debug("%s failed", what, exc_info=error)
