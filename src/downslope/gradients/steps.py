"""What optimizer steps did, from what was measured at each: for one step, or for many on a leading axis."""

import torch  # noqa: F401 — the examples'
from jaxtyping import Float
from torch import Tensor


def update_ratio(change_norm: Float[Tensor, "*any"], parameter_norm: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Returns ‖θₜ₊₁ − θₜ‖ / ‖θₜ‖: how far a step moved the weights, in units of their own size.

    Dividing by the new weights instead would be off by up to the ratio itself.

    Example:
        >>> update_ratio(torch.tensor(0.5), torch.tensor(5.0))
        tensor(0.1000)
    """
    return change_norm / parameter_norm


def effective_learning_rate(
    change_norm: Float[Tensor, "*steps"], gradient_norm: Float[Tensor, "*steps"]
) -> Float[Tensor, "*steps"]:
    """Returns ‖θₜ₊₁ − θₜ‖ / ‖g‖, with g the gradient that was applied: η for plain SGD, and not for Adam.

    Example:
        >>> effective_learning_rate(torch.tensor(0.5), torch.tensor(5.0))
        tensor(0.1000)
    """
    return change_norm / gradient_norm


def cosine(
    product: Float[Tensor, "*steps"], first_norm: Float[Tensor, "*steps"], second_norm: Float[Tensor, "*steps"]
) -> Float[Tensor, "*steps"]:
    """Returns the cosine of the angle between two gradients, each taken as one vector.

    cos = ⟨g₁, g₂⟩ / (‖g₁‖ ‖g₂‖): +1 is creeping along a slope, −1 bouncing across a valley; NaN where one is zero.

    Example:
        (1, 0) and (−2, 0):

        >>> cosine(torch.tensor(-2.0), torch.tensor(1.0), torch.tensor(2.0))
        tensor(-1.)
    """
    return product / (first_norm * second_norm)


def descent_ratio(
    loss_before: Float[Tensor, "*steps"],
    loss_after: Float[Tensor, "*steps"],
    rate_times_square: Float[Tensor, "*steps"],
) -> Float[Tensor, "*steps"]:
    """Returns the actual change of the loss over the one that the gradient promised.

    r = (L(θₜ₊₁) − L(θₜ)) / (−Σ η‖g‖²), both losses on the same batch, the sum over parameter groups. On a parabola
    along the gradient r = 1 − ηλ/2: 1 for a small step, ½ for the best one, 0 at the edge, below it uphill.

    Args:
        loss_before: L(θₜ).
        loss_after: L(θₜ₊₁).
        rate_times_square: Σ η‖g‖².

    Example:
        L = w², w = 1, g = 2, η = ½ goes to the bottom in one step:

        >>> descent_ratio(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.5 * 4.0))
        tensor(0.5000)

    Reference: Nocedal and Wright (2006), Numerical Optimization, section 3.1 (sufficient decrease).
    """
    return (loss_after - loss_before) / -rate_times_square
