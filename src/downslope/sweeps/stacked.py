"""Many runs of one module at once: their parameters stacked, each step of them all a few batched products.

A member is one run. What its optimizer is set to may differ from member to member; the module and the batches do not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from downslope.gradients.norms import part_norms

Stack = Mapping[str, Tensor]  # parameters or buffers by name, a leading axis of members
StackedLoss = Callable[[Stack, Any], Tensor]
DIVERGED_BEYOND = 1e6
REFUSED = ("maximize", "amsgrad")  # what an optimizer can be told and has no stacked form here


@runtime_checkable
class HasStackedLoss(Protocol):
    """A module that computes the loss of many copies of itself in fewer products than one at a time."""

    def stacked_loss(self, parameters: Stack, batch: Any) -> Tensor:
        """Returns what `loss(batch)` does, for each member.

        Args:
            parameters: By name, with a leading axis of members.
            batch: The same for all.
        """
        ...


class CannotStackError(ValueError):
    """These runs cannot be trained at once; the message says why."""


def stacked_loss(module: Any, buffers: Stack) -> StackedLoss:
    """Returns the loss of many members: by the module's own `stacked_loss`, else by `vmap` over its `loss`.

    Args:
        module: Has `loss(batch)`; whether it trains or is evaluated is its own to say.
        buffers: Stacked; batch normalization changes them in place.
    """
    if isinstance(module, HasStackedLoss):
        return module.stacked_loss
    call = _Loss(module)

    def one(parameters: Stack, buffers: Stack, batch: Any) -> Tensor:
        state = {f"module.{name}": value for name, value in (*parameters.items(), *buffers.items())}
        loss: Tensor = functional_call(call, state, (batch,))
        return loss

    def many(parameters: Stack, batch: Any) -> Tensor:
        losses: Tensor = vmap(one, in_dims=(0, 0, None))(dict(parameters), dict(buffers), batch)
        return losses

    return many


class _Loss(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        loss: Tensor = self.module.loss(batch)
        return loss


class StackedOptimizer(Optimizer):
    """Steps every member as its own optimizer would, and freezes one that diverges at its last finite weights.

    Diverged: a loss, a gradient or a weight is not finite, or the loss exceeds `DIVERGED_BEYOND` times the first. The
    step that did it is taken back, and the member costs nothing more: the parameters hold those that still train.

    Args:
        parameters: Each with a leading axis of members; or groups of them that have settings of their own.
        kind: SGD, Adam, AdamW or RMSprop.
        settings: What that takes, by name: a number for all, or a tensor with one for each member.
        buffers: With a leading axis of members too: what the loss changes in place is taken back like a weight.
        clip: Largest gradient norm of each member, infinity for none.
        clips_values: Clip each element instead.

    Attributes:
        alive: Which members still train.
        num_steps: Steps that each member has kept.
        norms: Of the gradients of those that trained in the last step, before clipping.
    """

    def __init__(
        self,
        parameters: Sequence[Any],
        kind: type[Optimizer],
        settings: Mapping[str, Any],
        buffers: Sequence[Tensor] = (),
        clip: Tensor | None = None,
        clips_values: bool = False,
    ) -> None:
        if kind not in RULES:
            raise CannotStackError(f"{kind.__name__} has no stacked form")
        defaults: dict[str, Any] = kind([nn.Parameter(torch.zeros(1))]).defaults  # type: ignore[call-arg]
        super().__init__(parameters, {"step": 0, **defaults, **settings})
        self.rule = RULES[kind]
        if told := [name for name in REFUSED for group in self.param_groups if group.get(name)]:
            raise CannotStackError(f"{kind.__name__} with {told[0]} has no stacked form")
        self.held: list[Tensor] = [each for group in self.param_groups for each in group["params"]]
        self.buffers = list(buffers)
        self.carried = [*self.held, *buffers]
        self.frozen = [each.detach().clone() for each in self.carried]  # of all members, once they diverge
        device, num_members = self.held[0].device, len(self.held[0])
        self.alive = torch.arange(num_members, device=device)
        self.num_steps = torch.zeros(num_members, dtype=torch.long, device=device)
        self.clip, self.clips_values = clip, clips_values
        self.first = torch.full((num_members,), torch.nan, device=device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Takes a step; `closure` returns the loss of each member that trains, after `backward` of their sum."""
        assert closure
        before, place = [each.detach().clone() for each in self.buffers], 0
        with torch.enable_grad():
            losses = closure().detach()
        gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in self.held]
        norms = [part_norms(each.flatten(1), [each[0].numel()])[:, 0] for each in gradients]
        self.norms = torch.linalg.vector_norm(torch.stack(norms).double(), dim=0)
        gradients = self._clipped(gradients)
        self.first = torch.where(self.first.isnan(), losses, self.first)
        before = [*(each.detach() for each in self.held), *before]
        for group in self.param_groups:
            group["step"] += 1
            told = {name: _of(value, self.alive) for name, value in group.items() if name not in ("params", "step")}
            for parameter in group["params"]:
                wide = {name: _wide(value, parameter) for name, value in told.items()}
                state = self.state[parameter]
                parameter.data = self.rule(parameter.detach(), gradients[place], state, wide, group["step"])
                place += 1
        is_good = (losses <= DIVERGED_BEYOND * self.first.abs()) & losses.isfinite() & self.norms.isfinite()
        for each in self.held:
            is_good &= each.flatten(1).sum(1).isfinite()  # a sum is quick, and not finite where an element is not
        self.num_steps[self.alive[is_good]] += 1
        if not bool(is_good.all()):
            self._freeze(before, is_good)
        return losses

    def _clipped(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        if self.clip is None:
            return list(gradients)
        if self.clips_values:
            limits = [_wide(self.clip[self.alive], each).to(each.dtype) for each in gradients]
            return [torch.clamp(each, -limit, limit) for each, limit in zip(gradients, limits, strict=True)]
        factors = (self.clip[self.alive] / (self.norms + 1e-6)).clamp(max=1.0)
        return [gradient * _wide(factors, gradient).to(gradient.dtype) for gradient in gradients]

    def _freeze(self, before: Sequence[Tensor], is_good: Tensor) -> None:
        ended = self.alive[~is_good]
        for each, old, frozen in zip(self.carried, before, self.frozen, strict=True):
            frozen[ended] = old[~is_good]
            each.data, each.grad = each.data[is_good], None
        for state in self.state.values():
            state.update({name: value[is_good] for name, value in state.items()})
        self.alive, self.first = self.alive[is_good], self.first[is_good]

    def weights(self) -> list[Tensor]:
        """Returns parameters and buffers of all members, frozen or not."""
        for each, frozen in zip(self.carried, self.frozen, strict=True):
            frozen[self.alive] = each.detach()
        return self.frozen


def _of(value: Any, members: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_of(each, members) for each in value)
    return value[members] if isinstance(value, Tensor) and len(members) < len(value) else value


def _wide(value: Any, like: Tensor) -> Any:
    """A number a member beside a tensor of theirs; it stays in float64 until it meets one, as in torch's optimizers."""
    if isinstance(value, tuple):
        return tuple(_wide(each, like) for each in value)
    return value.view(-1, *[1] * (like.dim() - 1)) if isinstance(value, Tensor) else value


def _narrow(value: Any, like: Tensor) -> Any:
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def _sgd(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], told: dict[str, Any], step: int) -> Tensor:
    decay, momentum = (_narrow(told[name], parameter) for name in ("weight_decay", "momentum"))
    rate = torch.as_tensor(told["lr"], dtype=gradient.dtype, device=gradient.device)
    if torch.as_tensor(decay).any():
        gradient = gradient + decay * parameter
    if torch.as_tensor(momentum).any():
        kept = 1 - _narrow(told["dampening"], parameter)
        old = state.get("momentum_buffer")
        buffer = state["momentum_buffer"] = gradient.clone() if old is None else momentum * old + kept * gradient
        moved = gradient + momentum * buffer if told["nesterov"] else buffer
        gradient = torch.where(torch.as_tensor(momentum) != 0, moved, gradient)  # without, dampening counts for nothing
    return torch.addcmul(parameter, gradient, rate, value=-1)


def _adam(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], told: dict[str, Any], step: int) -> Tensor:
    rate, decay, (one, two) = told["lr"], told["weight_decay"], told["betas"]
    if told.get("decoupled_weight_decay"):
        parameter = parameter * _narrow(1 - rate * decay, parameter)
    else:
        gradient = gradient + _narrow(decay, parameter) * parameter
    for name in ("exp_avg", "exp_avg_sq"):
        state.setdefault(name, torch.zeros_like(gradient))
    state["exp_avg"] += _narrow(1 - one, parameter) * (gradient - state["exp_avg"])
    square = _narrow(1 - two, parameter) * gradient * gradient
    state["exp_avg_sq"] = _narrow(two, parameter) * state["exp_avg_sq"] + square
    size, root = rate / (1 - one**step), (1 - two**step) ** 0.5
    spread = state["exp_avg_sq"].sqrt() / _narrow(root, parameter) + _narrow(told["eps"], parameter)
    return parameter.sub(_narrow(size, parameter) * (state["exp_avg"] / spread))


def _rmsprop(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], told: dict[str, Any], step: int) -> Tensor:
    names = ("lr", "weight_decay", "alpha", "eps", "momentum")
    rate, decay, alpha, epsilon, momentum = (_narrow(told[name], parameter) for name in names)
    gradient = gradient + decay * parameter
    for name in ("square_avg", "grad_avg", "momentum_buffer"):
        state.setdefault(name, torch.zeros_like(gradient))
    state["square_avg"] = alpha * state["square_avg"] + (1 - alpha) * gradient * gradient
    spread = state["square_avg"]
    if told["centered"]:
        state["grad_avg"] += (1 - alpha) * (gradient - state["grad_avg"])
        spread = spread - state["grad_avg"] ** 2
    state["momentum_buffer"] = momentum * state["momentum_buffer"] + gradient / (spread.sqrt() + epsilon)
    return parameter.sub(rate * state["momentum_buffer"])


RULES: dict[type[Optimizer], Callable[..., Tensor]] = {SGD: _sgd, Adam: _adam, AdamW: _adam, RMSprop: _rmsprop}
