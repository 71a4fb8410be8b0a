"""What one optimizer step did, measured on the parameters before and after it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from downslope.gradients.norms import norms, total_norm


def update_norms(
    before: Sequence[Float[Tensor, "..."]], after: Sequence[Float[Tensor, "..."]]
) -> tuple[Float[Tensor, " num_tensors"], Float[Tensor, " num_tensors"]]:
    """Returns ‖θₜ₊₁ − θₜ‖ and ‖θₜ‖ of each parameter: their quotient is the update ratio.

    Dividing by the new weights instead would be off by up to the ratio itself.

    Args:
        before: θₜ, one tensor a parameter.
        after: θₜ₊₁, in the same order.

    Example:
        >>> update_norms([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.5])])
        (tensor([0.5000]), tensor([5.]))
    """
    differences = torch._foreach_sub([tensor.detach() for tensor in after], list(before))
    return norms(differences), norms(before)


def cosine(first: Sequence[Float[Tensor, "..."]], second: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """Returns the cosine of the angle between two gradients, each taken as one vector.

    cos = ⟨g₁, g₂⟩ / (‖g₁‖ ‖g₂‖): +1 is creeping along a slope, −1 bouncing across a valley; NaN where one is zero.

    Example:
        >>> cosine([torch.tensor([1.0, 0.0])], [torch.tensor([-2.0, 0.0])])
        tensor(-1.)
    """
    pairs = [(one.to_dense(), other.to_dense()) for one, other in zip(first, second, strict=True)]
    product = torch.stack([torch.sum(one * other) for one, other in pairs]).sum()
    return product / (total_norm(norms(first)) * total_norm(norms(second)))


def descent_ratio(
    loss_before: Float[Tensor, ""], loss_after: Float[Tensor, ""], learning_rate_times_square: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Returns the actual change of the loss over the one that the gradient promised.

    r = (L(θₜ₊₁) − L(θₜ)) / (−Σ η‖g‖²), both losses on the same batch, the sum over parameter groups. On a parabola
    along the gradient r = 1 − ηλ/2: 1 for a small step, ½ for the best one, 0 at the edge, below it uphill.

    Args:
        loss_before: L(θₜ).
        loss_after: L(θₜ₊₁).
        learning_rate_times_square: Σ η‖g‖².

    Example:
        L = w², w = 1, g = 2, η = ½ goes to the bottom in one step:

        >>> descent_ratio(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.5 * 4.0))
        tensor(0.5000)

    Reference: Nocedal and Wright (2006), Numerical Optimization, section 3.1 (sufficient decrease).
    """
    return (loss_after - loss_before) / -learning_rate_times_square
