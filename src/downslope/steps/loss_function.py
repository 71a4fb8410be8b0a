"""A module's training loss as a function of its parameters: same place, same number, nothing left behind."""

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from downslope.steps.random_state import RandomState, random_state

Loss = Callable[[Any, Any], Tensor]


class LossFunction:
    """Maps parameters, by name, to the loss of one batch.

    Each evaluation happens in a fresh copy of the module and of the batch, from the same random state:
    dropout drops the same, batch statistics start from the same buffers, and the module itself never learns
    of it. What `training_step` logs with `self.log` is dropped.

    Args:
        module: A LightningModule (or any module, with `loss`).
        batch: What `training_step` gets; moved to the module's device.
        loss: Maps (module, batch) to the loss; `training_step` when None.
        dtype: The precision of the copies; the module's own when None.

    Raises:
        ValueError: The module cannot be copied, or its loss cannot be had without stepping an optimizer.
    """

    def __init__(
        self, module: nn.Module, batch: Any, loss: Loss | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._loss = loss or _first_batch(module)
        self._trainer = _trainer(module)
        self._random_state = RandomState()
        self._dtype = dtype
        try:
            self._module = copy.deepcopy(module, _intermediates(module))
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"Cannot check {type(module).__name__}. This is because a check works on a copy of it, "
                f"and something in it cannot be copied: {error}"
            ) from error
        if dtype is not None:
            self._module.to(dtype)
        first = next(self._module.parameters(), torch.empty(0))
        self._batch = _converted(batch, first.device, dtype)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The module's parameters by name, detached."""
        return {name: parameter.detach() for name, parameter in self._module.named_parameters()}

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that have a gradient."""
        return [name for name, parameter in self._module.named_parameters() if parameter.requires_grad]

    @property
    def epsilon(self) -> float:
        """The relative rounding error of the coarsest parameter."""
        dtypes = {parameter.dtype for parameter in self._module.parameters() if parameter.is_floating_point()}
        return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    @property
    def precision(self) -> str:
        """What the parameters are kept in, such as `float64`."""
        dtypes = {str(parameter.dtype) for parameter in self._module.parameters()}
        return " and ".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))

    def leaves(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns copies that autograd takes for parameters: an evaluation may edit them in place."""
        trainable = self.trainable
        return {
            name: nn.Parameter(tensor.clone(), requires_grad=name in trainable) for name, tensor in parameters.items()
        }

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss, with its graph.

        Args:
            parameters: One tensor for each name of `parameters`; dual numbers are welcome.

        Raises:
            ValueError: `training_step` returns no number.
        """
        # deepcopy takes what the memo holds instead of copying: so the copy stands on these very tensors,
        # tied or cached references to a parameter included.
        memo = {id(old): parameters[name] for name, old in self._module.named_parameters()}
        module = copy.deepcopy(self._module, memo)
        for part in module.modules():
            if hasattr(part, "log_dict"):
                vars(part).update(SILENT)
        if self._trainer is not None:
            module.trainer = self._trainer
        with random_state(self._random_state), _default_dtype(self._dtype), torch.enable_grad():
            value = self._loss(module, copy.deepcopy(self._batch))
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"`training_step` must return the loss, one number, got {got}.")
        return value.reshape(())

    def value_and_gradient(self, parameters: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
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


def _first_batch(module: nn.Module) -> Loss:
    try:
        loss = training_loss(module)
    except ValueError as error:
        raise ValueError(
            f"Cannot tell the loss of {type(module).__name__}. This is because {error}, or pass `loss`, a function of "
            "the module and the batch."
        ) from None
    return lambda module, batch: loss(module, batch, 0)


def training_loss(module: nn.Module) -> Callable[[Any, Any, int], Any]:
    """Returns how this module's loss is had: by its training_step, unless that would step an optimizer.

    Returns:
        Maps (module or a copy of it, batch, the batch's place in the epoch) to the loss.

    Raises:
        ValueError: Its optimization is manual, and it has no method `loss(batch)`.
    """
    if getattr(module, "automatic_optimization", True) and hasattr(module, "training_step"):
        arguments = inspect.signature(module.training_step).parameters  # type: ignore[arg-type]
        takes_index = len(arguments) > 1 or any(each.kind is each.VAR_POSITIONAL for each in arguments.values())

        def loss(module: Any, batch: Any, batch_index: int) -> Any:
            output = module.training_step(batch, batch_index) if takes_index else module.training_step(batch)
            return output.get("loss") if isinstance(output, Mapping) else output

        return loss
    # Of the class: an attribute called `loss` is rather a criterion, which takes predictions.
    if callable(getattr(type(module), "loss", None)):
        return lambda module, batch, _: module.loss(batch)
    reason = "takes a step" if hasattr(module, "training_step") else "does not exist"
    mode = "under manual optimization " if hasattr(module, "training_step") else ""
    raise ValueError(f"{mode}`training_step` {reason}: give the module a method `loss(batch)`")


def _trainer(module: nn.Module) -> Any:
    try:
        return module.trainer
    except (AttributeError, RuntimeError):  # no LightningModule, or none that has one yet
        return None


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `self.log`: an evaluation is no training step."""


SILENT = {"log": _log_nothing, "log_dict": _log_nothing}  # the attributes of a module that says nothing


def _intermediates(module: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, which refuses what a computation left on the module: it goes without history."""
    kept = (value for part in module.modules() for value in vars(part).values())
    return {id(value): value.detach().clone() for value in kept if isinstance(value, Tensor) and not value.is_leaf}


def _converted(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The batch on a device, its floating-point tensors in a precision; other objects as they are."""
    if isinstance(batch, Tensor):
        return batch.detach().to(device, dtype if batch.is_floating_point() else None)
    if isinstance(batch, Mapping):
        converted = {key: _converted(value, device, dtype) for key, value in batch.items()}
        return converted if type(batch) is dict else type(batch)(converted)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_converted(value, device, dtype) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_converted(value, device, dtype) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
        return dataclasses.replace(batch, **{k: _converted(v, device, dtype) for k, v in fields.items()})
    return batch


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Makes a tensor that `training_step` creates fit the precision of the copy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
