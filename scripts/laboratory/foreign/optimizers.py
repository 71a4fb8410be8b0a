"""Optimizers: torch's own, and such as other people write."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from foreign.peer import MakeOptimizer, imports

Closure = Callable[[], Any] | None


class CallsSuperStep(SGD):
    """torch's step, and something of its own after it: both run torch's hooks."""

    def step(self, closure: Closure = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for parameter in _parameters(self):
                parameter.mul_(0.999)
        return loss


class ReassignsData(Optimizer):
    """Every parameter gets another storage."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    def step(self, closure: Closure = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data = parameter.data - group["lr"] * parameter.grad.data
        return loss


class SharpnessAware(Optimizer):
    """SAM: evaluates the closure where it has climbed to as well."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:
        assert closure
        again = torch.enable_grad()(closure)
        loss = again()
        moved = [each for each in _parameters(self) if each.grad is not None]
        before = [each.detach().clone() for each in moved]
        for parameter in moved:
            parameter.add_(parameter.grad, alpha=0.05)
        again()
        for parameter, start in zip(moved, before, strict=True):
            parameter.copy_(start)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
        return loss


class Lookahead(Adam):
    """Slow weights take half of every third step."""

    def step(self, closure: Closure = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for parameter in _parameters(self):
                state = self.state[parameter]
                slow = state.setdefault("slow", parameter.detach().clone())
                state["num_fast"] = state.get("num_fast", 0) + 1
                if state["num_fast"] % 3 == 0:
                    parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


class ScheduleFree(Optimizer):
    """The gradient is taken between where the iterate is and the average of where it was."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01, "beta": 0.9, "k": 0})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> Any:
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                iterate = state.setdefault("z", parameter.detach().clone())
                average = state.setdefault("x", parameter.detach().clone())
                iterate.add_(parameter.grad, alpha=-group["lr"])
                average.lerp_(iterate, 1 / group["k"])
                parameter.copy_(iterate.lerp(average, group["beta"]))
        return loss


class Lion(Optimizer):
    """The sign of the momentum."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.001})

    def step(self, closure: Closure = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter.grad))
                    momentum.lerp_(parameter.grad, 0.1)
                    parameter.data.add_(momentum.sign(), alpha=-group["lr"])
        return loss


class Centralizes(SGD):
    """Changes the gradients in place before it uses them."""

    def step(self, closure: Closure = None) -> Any:
        loss = closure() if closure else None
        for parameter in _parameters(self):
            if parameter.grad is not None and parameter.dim() > 1:
                parameter.grad.sub_(parameter.grad.mean())
        super().step()
        return loss


class Noisy(SGD):
    """Langevin dynamics: draws random numbers in each step."""

    def step(self, closure: Closure = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for parameter in _parameters(self):
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        return loss


class Wrapped(Optimizer):
    """Holds another optimizer, and steps by it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})
        self.inner = SGD(self.param_groups, lr=0.01, momentum=0.9)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Closure = None) -> Any:
        return self.inner.step(closure)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _matrices(params: Iterable[Any]) -> Optimizer:
    """Muon takes matrices alone: what is none stays as it is."""
    flattened = [each for part in params for each in (part["params"] if isinstance(part, dict) else [part])]
    return torch.optim.Muon([each for each in flattened if each.dim() == 2], lr=0.01)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": partial(SGD, lr=0.05),
    "SGD-momentum": partial(SGD, lr=0.02, momentum=0.9),
    "SGD-Nesterov": partial(SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD-fused": partial(SGD, lr=0.05, momentum=0.5, fused=True),
    "SGD-tensor-rate": lambda params: SGD(params, lr=torch.tensor(0.05)),  # schedules change it in place
    "Adam": partial(Adam, lr=0.01),
    "Adam-amsgrad": partial(Adam, lr=0.01, amsgrad=True),
    "Adam-foreach": partial(Adam, lr=0.01, foreach=True),
    "AdamW-fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "Adamax": partial(torch.optim.Adamax, lr=0.01),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "RAdam": partial(torch.optim.RAdam, lr=0.01),
    "Adadelta": partial(torch.optim.Adadelta, lr=0.5),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "ASGD": partial(torch.optim.ASGD, lr=0.05),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "Rprop": partial(torch.optim.Rprop, lr=0.01),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
    "LBFGS-Wolfe": partial(torch.optim.LBFGS, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
    "Muon": _matrices,
    "SparseAdam": partial(torch.optim.SparseAdam, lr=0.01),
    "CallsSuperStep": partial(CallsSuperStep, lr=0.05),
    "ReassignsData": ReassignsData,
    "SharpnessAware": SharpnessAware,
    "Lookahead": partial(Lookahead, lr=0.01),
    "ScheduleFree": ScheduleFree,
    "Lion": Lion,
    "Centralizes": partial(Centralizes, lr=0.05),
    "Noisy": partial(Noisy, lr=0.05),
    "Wrapped": Wrapped,
}

if imports("pytorch_optimizer"):
    import pytorch_optimizer

    for _name in ("AdaBelief", "Lion", "Prodigy", "SophiaH", "LaProp", "Ranger21", "AdamP"):
        if hasattr(pytorch_optimizer, _name):
            OPTIMIZERS[f"pytorch_optimizer.{_name}"] = getattr(pytorch_optimizer, _name)
