"""Around every optimizer step, in every mode: where θₜ and θₜ₊₁ can be read, and the gradient between them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from downslope.gradients.finiteness import wide_norms
from downslope.gradients.norms import HALF
from downslope.gradients.vectors import flat

AHEAD = 64  # steps


@dataclass
class OptimizerStep:
    """One optimizer's coming or just taken step.

    Attributes:
        optimizer: torch's own, also where Lightning wraps it.
        name: Its class, with its place where several of one class are there: `Adam`, `Adam-1`.
        step: t, the optimizer steps taken before this one by all optimizers together: the x-axis.
        count: The steps taken before this one by this optimizer.
        suffix: What tells its tags from those of the other optimizers: `/Adam-1`, or nothing where it is alone.
        moved: After the step, the parameters that have a gradient; the same tuple while they are the same.
        gradients: Theirs, as they were applied.
        due: Who is called at the coming step.
        coming: And at those after it, the last of them first.
    """

    optimizer: Optimizer
    name: str
    step: int
    count: int
    suffix: str
    moved: tuple[Parameter, ...] = ()
    gradients: list[Tensor] = field(default_factory=list)
    due: list["OptimizerSteps"] = field(default_factory=list)
    coming: list[list["OptimizerSteps"]] = field(default_factory=list)
    _parameters: list[Parameter] = field(default_factory=list)
    _flat: Tensor | None = None
    _square: Tensor | None = None
    _norms: Tensor | None = None
    _depth: int = 0
    _batch: int = -1

    @property
    def parameters(self) -> list[Parameter]:
        """What it steps; the same list while they are the same."""
        parameters = held([self.optimizer])
        self._parameters = self._parameters if are_same(parameters, self._parameters) else parameters
        return self._parameters

    def begins(self, batch: int) -> bool:
        """Tells whether a step begins, and not one within it: a `step` that calls `super().step()` runs hooks twice.

        Args:
            batch: The number of the batch. A step that raised is over when the next batch comes.
        """
        self._depth = self._depth + 1 if batch == self._batch else 1
        self._batch = batch
        return self._depth == 1

    def ends(self) -> bool:
        """Tells whether the whole step ends."""
        self._depth -= 1
        return self._depth == 0

    def look(self) -> None:
        """Finds `moved` and `gradients`, after the step."""
        pairs = [(each, gradient) for each in held([self.optimizer]) if (gradient := each.grad) is not None]
        moved = tuple([each for each, _ in pairs])
        self.moved = self.moved if are_same(moved, self.moved) else moved
        self.gradients = [gradient for _, gradient in pairs]

    @property
    def flat_gradient(self) -> Tensor:
        """All of `gradients` as one vector, half precision as float32; computed once for all observers."""
        if self._flat is None:
            vector = flat(self.gradients)
            self._flat = vector.float() if vector.dtype in HALF else vector
        return self._flat

    @property
    def gradient_square(self) -> Tensor:
        """‖g‖² of `flat_gradient`, computed once for all observers."""
        if self._square is None:
            self._square = torch.dot(self.flat_gradient, self.flat_gradient)
        return self._square

    @property
    def gradient_norms(self) -> Tensor:
        """The norm of each of `gradients`, `wide_norms`, computed once for all observers."""
        if self._norms is None:
            self._norms = wide_norms(self.gradients)
        return self._norms

    def forget(self) -> None:
        """Lets the gradients go."""
        self.gradients, self._flat, self._square, self._norms = [], None, None, None


def are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Tells whether two sequences hold the very same tensors in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))


@dataclass(eq=False)
class OptimizerSteps:
    """Calls a function before, and one after, each step that an optimizer of the trainer really takes.

    torch's own hooks, because Lightning's differ by mode: with automatic optimization `before` runs before the closure,
    so that gradients are still stale, and `after` when clipping and unscaling are done. With a raw torch optimizer
    Lightning's are not called at all, and `global_step` stands still: then the steps are counted here. A step that a
    GradScaler skips calls only Lightning's counter, neither function.

    All observers of a trainer share one pair of hooks, and see the same states.

    Attributes:
        before: Called with θₜ in place.
        after: Called with θₜ₊₁ in place, and in `.grad` the gradient that was applied.
        due: Tells of the number of an optimizer's step, counted from 0, whether both are called; at each if None. It is
            asked beforehand.
        on_next: Called where a step that is due begins or stops to be the coming one.
        on_loss: Called in the middle of each step that is given a closure, with the loss that this returns: gradients
            are final, parameters still θₜ.
    """

    trainer: InitVar[Trainer]  # its optimizers are set up: from `on_train_start` on
    before: Callable[[OptimizerStep], None] | None = None
    after: Callable[[OptimizerStep], None] | None = None
    due: Callable[[int], bool] | None = None
    on_next: Callable[[], None] | None = None
    on_loss: Callable[[Tensor | None], None] | None = None

    def __post_init__(self, trainer: Trainer) -> None:
        hooks = _HOOKS.get(trainer)
        if hooks is None or [state.optimizer for state in hooks.states] != trainer.optimizers:  # of a fit that failed
            hooks = _HOOKS[trainer] = _Hooks(trainer)
        self._hooks = hooks
        self._hooks.observe([*self._hooks.observers, self])
        self.states = self._hooks.states

    def are_due(self) -> bool:
        """Tells whether the coming step of any optimizer is due."""
        return self.due is None or any(self.due(state.count) for state in self.states)

    def detach(self) -> None:
        """Leaves the optimizers as they were."""
        if self in self._hooks.observers:
            self._hooks.observe([each for each in self._hooks.observers if each is not self])
        if not self._hooks.observers:
            self._hooks.remove()


class _Hooks:
    """One pair of hooks on each optimizer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = ref(trainer)
        self._batches = trainer.fit_loop.epoch_loop.batch_progress.total
        self._skips = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._num_steps = trainer.global_step
        self.observers: list[OptimizerSteps] = []
        alone = len(trainer.optimizers) == 1
        self.states = [
            OptimizerStep(optimizer, name, 0, trainer.global_step if alone else 0, "" if alone else f"/{name}")
            for optimizer, name in zip(trainer.optimizers, optimizer_names(trainer.optimizers), strict=True)
        ]
        self._handles: list[RemovableHandle] = []
        for state in self.states:
            self._handles.append(state.optimizer.register_step_pre_hook(partial(self._before, state)))
            self._handles.append(state.optimizer.register_step_post_hook(partial(self._after, state)))

    def observe(self, observers: list[OptimizerSteps]) -> None:
        """Calls these from now on."""
        self.observers = observers
        for state in self.states:
            state.coming.clear()
            state.due = self._due(state)

    def _due(self, state: OptimizerStep) -> list[OptimizerSteps]:
        """Those to whom the coming step is due: asked for many steps at once, because one by one it takes longer."""
        if not state.coming:
            counts = reversed(range(state.count, state.count + AHEAD))
            state.coming = [[each for each in self.observers if each.due is None or each.due(n)] for n in counts]
        return state.coming.pop()

    def _before(self, state: OptimizerStep, _: Optimizer, __: object, named: dict[str, Any]) -> None:
        if not state.begins(self._batches.ready):
            return
        trainer = self._trainer() if self._skips else None  # otherwise its count, which takes time, is this one
        state.step = max(trainer.global_step, self._num_steps) if trainer else self._num_steps
        if not state.due:
            return
        with torch.no_grad():
            for observer in state.due:
                if observer.before:
                    observer.before(state)
        listeners = [each.on_loss for each in state.due if each.on_loss]
        if listeners and named.get("closure"):
            named["closure"] = partial(_overheard, named["closure"], listeners)

    def _after(self, state: OptimizerStep, *_: object) -> None:
        if not state.ends():
            return
        due = state.due
        if due:
            state.look()
            with torch.no_grad():
                for observer in due:
                    if observer.after:
                        observer.after(state)
            state.forget()
        self._num_steps = state.step + 1
        state.count += 1
        state.due = self._due(state)
        for observer in due if due == state.due else self.observers:
            if observer.on_next and (observer in due or observer in state.due):
                observer.on_next()

    def remove(self) -> None:
        """Takes them off, and lets the next observers begin anew."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for trainer in [trainer for trainer, hooks in _HOOKS.items() if hooks is self]:
            del _HOOKS[trainer]


def _overheard(closure: Callable[[], Tensor | None], listeners: list[Callable[[Tensor | None], None]]) -> Tensor | None:
    """Runs a closure, and tells the loss."""
    loss = closure()
    for on_loss in listeners:
        on_loss(loss)
    return loss


_HOOKS: WeakKeyDictionary[Trainer, _Hooks] = WeakKeyDictionary()


def optimizer_names(optimizers: list[Optimizer]) -> list[str]:
    """Returns each optimizer's class name, numbered from the second of a class on: `Adam`, `Adam-1`."""
    names: list[str] = []
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        place = sum(type(other).__name__ == kind for other in optimizers[: len(names)])
        names.append(f"{kind}-{place}" if place else kind)
    return names


def each_batch_is_a_step(trainer: Trainer, module: LightningModule) -> bool:
    """Tells whether each batch takes one step by the Trainer, in this process alone: its loss is the closure's."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return (
        module.automatic_optimization
        and getattr(trainer.precision_plugin, "scaler", None) is None
        and trainer.accumulate_grad_batches == trainer.world_size == 1
        and not any(isinstance(each, GradientAccumulationScheduler) for each in callbacks)
        and not overrides(module, "optimizer_step")
    )


def held(optimizers: Iterable[Optimizer]) -> list[Parameter]:
    """Returns what optimizers step, in their order."""
    return [each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]]


def overrides(module: LightningModule, *hooks: str) -> bool:
    """Tells whether a module has any of Lightning's hooks of its own."""
    return any(getattr(type(module), hook) is not getattr(LightningModule, hook) for hook in hooks)


def num_steps(trainer: Trainer) -> int | None:
    """Returns the optimizer steps that the whole training takes, None for no limit."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps != float("inf") else None


class ParameterNames(dict[int, str]):
    """The name of each parameter by its id, a tied one once, without what `torch.compile` puts in between.

    A module may grow, and an optimizer may hold what its module does not: names are looked up again then, and a tensor
    that has none is `tensor-0`, `tensor-1`, ….
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self._module = module
        self._named: list[Tensor] = []  # kept, so that no other gets their ids
        self._look()

    def _look(self) -> None:
        for name, parameter in self._module.named_parameters():
            if id(parameter) not in self:
                self._named.append(parameter)
                self[id(parameter)] = name.replace("_orig_mod.", "")

    def of(self, tensors: Iterable[Tensor]) -> list[str]:
        """Returns the tensors' names."""
        return [self.get(id(each)) or self._new(each) for each in tensors]

    def _new(self, tensor: Tensor) -> str:
        self._look()
        if id(tensor) not in self:
            self._named.append(tensor)
            self[id(tensor)] = f"tensor-{sum(name.startswith('tensor-') for name in self.values())}"
        return self[id(tensor)]
