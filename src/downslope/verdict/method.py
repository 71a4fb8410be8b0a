"""What an optimizer is: its method, its rate, its decay."""

from typing import Any, Literal

from torch.optim import LBFGS, SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

Method = Literal["gradient_descent", "momentum", "nesterov", "adam", "lbfgs", "other"]


def rate_of(optimizer: Optimizer) -> float:
    """The largest of its groups' rates."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def method_of(optimizer: Optimizer) -> tuple[Method, float]:
    """What the theory knows of the optimizer, and β."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, SGD) and not group.get("dampening") and not group.get("maximize"):
        momentum = float(group["momentum"])
        return ("nesterov" if group["nesterov"] else "momentum") if momentum else "gradient_descent", momentum
    if isinstance(optimizer, LBFGS):
        return "lbfgs", 0.0
    return ("adam" if isinstance(optimizer, Adam | NAdam | RAdam | RMSprop) else "other"), 0.0


def first_length(optimizer: Optimizer, step: int) -> float:
    """What the step after so many is of those to come along a constant gradient.

    Momentum's are short, (1 − βᵗ⁺¹) of them; RMSprop's, whose mean square begins at 0, long, 1/√(1 − αᵗ⁺¹).
    """
    if isinstance(optimizer, RMSprop):
        return float((1 - optimizer.param_groups[0]["alpha"] ** (step + 1)) ** -0.5)
    return float(1 - method_of(optimizer)[1] ** (step + 1))


def decays_of(optimizer: Optimizer) -> list[float]:
    """What is added of each parameter to its gradient; AdamW shortens the weights apart from that."""
    return [
        decay
        for group in optimizer.param_groups
        for decay in [float(group["weight_decay"]) if _is_coupled(optimizer, group) else 0.0] * len(group["params"])
    ]


def decay_of(optimizer: Optimizer) -> tuple[float, float]:
    """The first group's decay within the gradient, and what its decay apart from that takes of the weights a step."""
    group = optimizer.param_groups[0]
    decay = float(group.get("weight_decay") or 0.0)
    return (decay, 0.0) if _is_coupled(optimizer, group) else (0.0, float(group["lr"]) * decay)


def _is_coupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    is_coupled = isinstance(optimizer, SGD | Adam | NAdam | RAdam | RMSprop) and not isinstance(optimizer, AdamW)
    return is_coupled and not group.get("decoupled_weight_decay")


def is_maximising(optimizer: Optimizer) -> bool:
    """Whether it goes uphill, as it was told."""
    return any(group.get("maximize") for group in optimizer.param_groups)
