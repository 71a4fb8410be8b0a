"""Learning-rate schedules that torch spells in several objects."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR


def warmup_cosine(optimizer: Optimizer, num_warmup: int, num_total: int) -> SequentialLR:
    """Rises linearly from a hundredth of the learning rate, then falls along a half cosine to 0.

    Args:
        optimizer: Its rate is the top.
        num_warmup: Intervals until the top.
        num_total: Intervals until 0; more than `num_warmup`.
    """
    if not 0 < num_warmup < num_total:
        raise ValueError(f"`num_warmup` must be between 0 and the {num_total} epochs, got {num_warmup}.")
    warmup = LinearLR(optimizer, start_factor=0.01, total_iters=num_warmup)
    cosine = CosineAnnealingLR(optimizer, T_max=num_total - num_warmup)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[num_warmup])
