"""A batch's loss once more, at any parameters: with leave alone, and without a trace."""

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from downslope.gradients.vectors import clones, num_elements, shaped
from downslope.steps.attributes import Attributes
from downslope.steps.random_state import RandomState, own_generators, random_state

log = logging.getLogger(__name__)


Loss = Callable[[Any, Any], Tensor] | Literal["training_step"]
Parameters = dict[str, Tensor]  # by name


class HasLoss(Protocol):
    """A module that gives leave to compute the loss of a batch again, at any time and at any parameters.

    Beyond buffers and random numbers `loss` has no consequences; `self.log` inside it is silent meanwhile.
    """

    def loss(self, batch: Any) -> Tensor:
        """Returns the training loss of a batch, one number."""
        ...


@lru_cache(maxsize=16)
def has_loss(kind: type) -> bool:
    """Tells whether a module's class has a method `loss` with exactly one required argument, the batch.

    An attribute called `loss` is rather a criterion, and a method of two arguments takes predictions.
    """
    if not inspect.isroutine(method := getattr(kind, "loss", None)):
        return False
    arguments = inspect.signature(method).parameters.values()
    num_bound = 0 if isinstance(inspect.getattr_static(kind, "loss"), staticmethod | classmethod) else 1
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [each for each in arguments if each.default is each.empty and each.kind not in variadic][num_bound:]
    return len(required) == 1 and required[0].kind is not inspect.Parameter.KEYWORD_ONLY


def check_loss(loss: object) -> None:
    """Refuses a setting `loss` that is none.

    Raises:
        ValueError: It is neither None, a function nor "training_step".
    """
    if loss is not None and loss != "training_step" and not callable(loss):
        raise ValueError(f"`loss` must be a function of module and batch, 'training_step' or null, got {loss!r}.")


def why_no_loss(module: nn.Module, loss: Loss | None) -> str | None:
    """Returns why a module's loss cannot be computed again, and what would help; None where it can."""
    name = type(module).__name__
    if loss == "training_step":
        if not getattr(module, "automatic_optimization", True):
            return "under manual optimization `training_step` takes a step: give the module a method `loss(batch)`"
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:  # type: ignore[arg-type]
            return "`training_step` takes its batch from an iterator: give the module a method `loss(batch)`"
    elif loss is None and not has_loss(type(module)):  # type: ignore[arg-type]
        return (
            f"{name} has no method `loss(batch)`: add one, or give the callback `loss=`, a function of module and "
            'batch, or "training_step" where calling that again has no consequences'
        )
    return None


def why_not_one_optimizer(trainer: Trainer) -> str | None:
    """Returns why it is not known which loss belongs to whom, None where it is."""
    if len(trainer.optimizers) > 1:
        return "there are several optimizers, and it is not known which loss belongs to which"
    has_one = any(optimizer.param_groups for optimizer in trainer.optimizers)  # Lightning's stand-in has no groups
    return None if has_one else "there is no optimizer"


def why_no_loss_of_a_step(
    trainer: Trainer, module: LightningModule, loss: Loss | None, one_batch: bool = True
) -> str | None:
    """Returns why a step cannot be held against the loss of its batch (or its batches), None where it can."""
    if one_batch and trainer.accumulate_grad_batches > 1:
        return "gradients are accumulated: a step follows several batches, and not one"
    if reason := why_not_one_optimizer(trainer):
        return reason
    if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        return "LBFGS evaluates the loss many times a step"
    if trainer.world_size > 1:
        return "each process knows only the loss of its own share of the batch"
    return why_no_loss(module, loss)


_TOLD: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()


def said_off(trainer: Trainer, what: str, reason: str | None) -> bool:
    """Tells whether there is a reason not to measure, and warns of it: one line for all observers of a trainer.

    Args:
        trainer: Fits the module.
        what: Is off, a tag or a file.
        reason: As `why_no_loss` and its like give it.
    """
    told = _TOLD.setdefault(trainer, set())
    if reason is not None:
        level = logging.INFO if reason in told else logging.WARNING
        log.log(level, "%s is off, like everything that evaluates a step's loss again: %s.", what, reason)
        told.add(reason)
    return reason is not None


class BatchLoss:
    """The loss of one batch as a function of the parameters: the same place, the same number, nothing left behind.

    It is made before the batch's own forward, and keeps a copy of the batch and the random state of that moment: each
    evaluation draws the same numbers, dropout drops the same elements. It happens on copies of parameters, buffers and
    batch; `self.log` and the loggers are silent; random states are put back, and so are plain attributes of the module
    and of its parts. Where one of those changed, apart from torchmetrics', the figure cannot be trusted, and an error
    says so.

    Args:
        module: Trains, or is to be checked.
        batch: As `training_step` gets it.
        loss: A function of module and batch, or "training_step" where calling that again has no consequences; the
            module's own `loss(batch)` when None.
        batch_index: The batch's place in the epoch, for `"training_step"`.
        dtype: The precision of all copies; their own when None.
        precise: Compute what can be derived twice: in the parameters' precision instead of the trainer's autocast,
            and without fused attention. Compiled code is left out in any case.

    Raises:
        ValueError: The module gives no leave.

    Example:
        >>> loss = BatchLoss(nn.Linear(1, 1, bias=False), torch.tensor([[3.0]]), lambda line, batch: line(batch).sum())
        >>> loss.along({"weight": torch.tensor([[2.0]])}, {"weight": torch.tensor([[-1.0]])})(0.5)  # 3 · (2 − 0.5)
        tensor(4.5000)
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        loss: Loss | None = None,
        batch_index: int = 0,
        dtype: torch.dtype | None = None,
        precise: bool = False,
    ) -> None:
        if reason := why_no_loss(module, loss):
            raise ValueError(reason)
        self._module = module
        self._name = "training_step" if loss == "training_step" else "loss"
        self._function = _Function(module, loss, batch_index)
        self._dtype = dtype
        self._precise = precise
        self._batch = copied(batch, dtype)
        self._parts = list(module.named_modules())
        self._generators = own_generators(part for _, part in self._parts)
        self._start = RandomState(*self._generators)
        self._own = dict(module.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._own.items()}
        self._is_open = False

    @property
    def parameters(self) -> Parameters:
        """Copies of the module's parameters as they are now."""
        return self._copies(self._own)

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that have a gradient."""
        return [name for name, parameter in self._own.items() if parameter.requires_grad]

    def leaves(self, parameters: Mapping[str, Tensor]) -> Parameters:
        """Returns copies that autograd takes for parameters: an evaluation may edit them in place."""
        return self._leaves(self._copies(parameters))

    def _leaves(self, copies: Parameters) -> Parameters:
        return {name: nn.Parameter(tensor, self._own[name].requires_grad) for name, tensor in copies.items()}

    def names(self, parameters: Iterable[Tensor]) -> list[str]:
        """Returns the names of what an optimizer holds.

        Raises:
            ValueError: One is no parameter of the module.
        """
        try:
            return [self._names[id(parameter)] for parameter in parameters]
        except KeyError:
            raise ValueError("the optimizer holds a tensor that is no parameter of the module") from None

    def pieces(self, parameters: Sequence[Tensor], vector: Tensor) -> Parameters:
        """Returns the parts of a vector, which holds these parameters in a row, by the parameters' names."""
        rows = vector.split(list(map(num_elements, parameters)))
        return dict(zip(self.names(parameters), map(shaped, rows, parameters), strict=True))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Lets evaluations inside share what each would else do alone: to keep and to put back.

        Raises:
            ValueError: At the end: an attribute had changed.
        """
        attributes = Attributes(self._parts)
        self._is_open = True
        self._find_slots()
        try:
            with ExitStack() as contexts, random_state(self._generators):
                for context in self._contexts():
                    contexts.enter_context(context)
                yield
        finally:
            self._is_open = False
            changed = attributes.put_back()
        if changed:
            raise ValueError(
                f"`{self._name}` of {type(self._module).__name__} must change nothing but buffers, and changes "
                f"`{'`, `'.join(changed)}`: that was put back"
            )

    def _contexts(self) -> Iterator[Any]:
        trainer = _attached_trainer(self._module)
        if trainer:
            yield trainer.precision_plugin.train_step_context()  # its autocast; 16-true makes tensors in 16 bits
        yield silent(trainer, self._module.modules(), self._dtype)
        yield torch.compiler.set_stance("force_eager")
        if self._precise:
            yield sdpa_kernel(SDPBackend.MATH)
            device = next(iter(self._own.values()), torch.empty(0)).device
            yield torch.autocast(device.type, enabled=False)

    def _find_slots(self) -> None:
        """Finds each place that a parameter or buffer stands in, with the one name by which a tied one goes.

        `functional_call` would tie them itself, and leave its copies in a part that stands under two names.
        """
        self._buffers: Parameters = {}
        self._slots: dict[str, str] = {}
        for place, part in self._parts:
            prefix = f"{place}." if place else ""
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    self._slots[f"module.{prefix}{name}"] = self._names[id(parameter)]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    self._buffers[prefix + name] = buffer
                    self._slots[f"module.{prefix}{name}"] = prefix + name

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss, with its graph.

        Args:
            parameters: One tensor for each name of `parameters`, as `leaves` makes them; dual numbers are welcome.

        Raises:
            ValueError: It is not one number, or (outside of `measuring`) an attribute changed.
        """
        if not self._is_open:
            with self.measuring():
                return self(parameters)
        tensors = {**self._copies(self._buffers), **parameters}
        placed = {slot: tensors[name] for slot, name in self._slots.items()}
        batch = copied(self._batch)
        self._start.restore()
        with torch.enable_grad():
            value = functional_call(self._function, placed, (batch,), tie_weights=False)
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.reshape(())
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"`{self._name}` must return the loss, one number, got {got}")

    def along(self, start: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Callable[[float], Tensor]:
        """Returns the function t ↦ L(start + t · direction), detached.

        Args:
            start: Parameters by name; those that are left out stay where they are now.
            direction: Of some of these names, or of all.
        """
        origin, arrow = [start[name] for name in direction], list(direction.values())

        def loss(length: float) -> Tensor:
            moved = torch._foreach_add(origin, arrow, alpha=length) if length else origin
            others = {name: tensor for name, tensor in {**self._own, **start}.items() if name not in direction}
            there = dict(zip(direction, moved, strict=True))
            # What nobody else has needs no second copy, which of a large model would be one too many.
            is_new = length and self._dtype is None
            return self(self._leaves(self._copies(others) | (there if is_new else self._copies(there)))).detach()

        return loss

    def value_and_gradient(self, parameters: Mapping[str, Tensor]) -> tuple[float, Parameters]:
        """Returns the loss and autograd's gradient by name, zeros where the loss does not depend on one."""
        leaves, trainable = self.leaves(parameters), self.trainable
        loss = self(leaves)
        if not loss.requires_grad:
            return float(loss), {name: torch.zeros_like(parameters[name]) for name in trainable}
        found = torch.autograd.grad(loss, [leaves[name] for name in trainable], allow_unused=True)
        return float(loss.detach()), {
            name: torch.zeros_like(parameters[name]) if gradient is None else gradient.to_dense()
            for name, gradient in zip(trainable, found, strict=True)
        }

    def _copies(self, tensors: Mapping[str, Tensor]) -> Parameters:
        if self._dtype is not None:
            return {name: copied(tensor.detach(), self._dtype) for name, tensor in tensors.items()}
        return dict(zip(tensors, clones([tensor.detach() for tensor in tensors.values()]), strict=True))


class _Function(nn.Module):
    """Makes a module's loss a forward, which is what `functional_call` calls."""

    def __init__(self, module: Any, loss: Loss | None, batch_index: int) -> None:
        super().__init__()
        self.module = module
        self._loss = loss
        self._batch_index = batch_index

    def forward(self, batch: Any) -> Any:
        if self._loss is None:
            return self.module.loss(batch)
        if callable(self._loss):
            return self._loss(self.module, batch)
        arguments = inspect.signature(self.module.training_step).parameters.values()
        takes_index = len(arguments) > 1 or any(each.kind is each.VAR_POSITIONAL for each in arguments)
        output = self.module.training_step(batch, *[self._batch_index] * takes_index)
        return output.get("loss") if isinstance(output, Mapping) else output


def _attached_trainer(module: nn.Module) -> Trainer | None:
    try:
        trainer = getattr(module, "trainer", None)
    except RuntimeError:  # not attached yet
        return None
    return trainer if isinstance(trainer, Trainer) else None


@contextmanager
def silent(trainer: Trainer | None, parts: Iterable[nn.Module], dtype: torch.dtype | None = None) -> Iterator[None]:
    """Silences `self.log` and the loggers, and lets a tensor that the loss creates fit the precision of the copies."""
    speakers = [part for part in parts if isinstance(part, LightningModule)]
    loggers, default = trainer.loggers if trainer else [], torch.get_default_dtype()
    own = [{name: each for name, each in vars(part).items() if name in ("log", "log_dict")} for part in speakers]
    for part in speakers:
        vars(part).update(log=_say_nothing, log_dict=_say_nothing)
    if trainer:
        trainer.loggers = [DummyLogger() for _ in loggers]  # a module may write to its logger directly
    torch.set_default_dtype(dtype or default)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        if trainer:
            trainer.loggers = loggers
        for part, methods in zip(speakers, own, strict=True):
            del vars(part)["log"], vars(part)["log_dict"]
            vars(part).update(methods)


def _say_nothing(*args: Any, **kwargs: Any) -> None: ...


def copied(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """Returns a copy of all that an evaluation may change in a batch, its real and complex tensors in a precision."""
    if isinstance(batch, Tensor):
        is_real = batch.is_floating_point() or batch.is_complex()
        precision = torch.promote_types(batch.dtype, dtype) if dtype and is_real else batch.dtype
        twin = batch.detach().to(precision, copy=True)
        return twin.requires_grad_() if batch.requires_grad else twin
    if isinstance(batch, MutableMapping):
        mapping = copy.copy(batch)
        mapping.update({key: copied(value, dtype) for key, value in batch.items()})
        return mapping
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(copied(value, dtype) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(copied(value, dtype) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
        return dataclasses.replace(batch, **{name: copied(value, dtype) for name, value in fields.items()})
    return copy.deepcopy(batch)
