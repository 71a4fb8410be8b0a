"""Learning-rate schedules that end where the run ends."""

import inspect
import math
from typing import Any

from lightning import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def schedulers(settings: dict[str, Any], optimizer: Optimizer, trainer: Trainer) -> list[dict[str, Any]]:
    """Returns what Lightning is to know of an optimizer's schedule; nothing where the rate stays as it is.

    Args:
        settings: `scheduler` makes it, given the optimizer; where that takes `num_steps`, and is not given it, it gets
            the optimizer steps of the whole run. The rest is Lightning's: `interval`, `frequency`, `monitor`.
        optimizer: Whose rate it is.
        trainer: Knows where the run ends.
    """
    make = settings["scheduler"]
    if make is None:
        return []
    num_steps: Any = inspect.signature(make).parameters.get("num_steps")
    is_missing = num_steps is not None and num_steps.default is num_steps.empty
    length = {"num_steps": trainer.estimated_stepping_batches} if is_missing else {}
    return [{**settings, "scheduler": make(optimizer, **length)}]


def cosine(optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """Falls along a half cosine, rate × ½(1 + cos(π t / num_steps)) at step t; afterwards 0."""
    return LambdaLR(optimizer, lambda step: _half_cosine(step / num_steps))


def warmup_cosine(optimizer: Optimizer, num_steps: int, warmup: float) -> LambdaLR:
    """Rises linearly from a hundredth of the learning rate, then falls along a half cosine to 0.

    Args:
        optimizer: Its rate is the top.
        num_steps: Steps until 0.
        warmup: The share of them until the top; more than 0 and less than 1.
    """
    if not 0 < warmup < 1:
        raise ValueError(f"`warmup` must be a share of the run between 0 and 1, got {warmup}.")
    top = warmup * num_steps

    def share_of_the_rate(step: int) -> float:
        return 0.01 + 0.99 * step / top if step < top else _half_cosine((step - top) / (num_steps - top))

    return LambdaLR(optimizer, share_of_the_rate)


def _half_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * min(share, 1))) / 2
