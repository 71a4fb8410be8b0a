"""The losses of a whole run in at most 256 blocks: has the loss fallen, by more than chance?"""

import math
from collections.abc import Sequence
from functools import reduce
from statistics import fmean
from typing import Any, NamedTuple

MOST_BLOCKS = 256
FEW = 1e-12
EARLY = 16  # steps in which a rate that is too large shows itself


class Block(NamedTuple):
    """The losses between two judgements: how many, their mean, and mean and variance of their logarithms."""

    num: int
    mean: float
    level: float
    spread: float

    @classmethod
    def of(cls, losses: Sequence[float]) -> "Block":
        """In logarithms, so that a factor counts the same up and down; a loss that can be negative as it is."""
        levels = [math.log(loss) for loss in losses] if min(losses) > 0 else losses
        level = fmean(levels)  # the library's variance is exact, and takes twenty times as long
        spread = sum([(each - level) ** 2 for each in levels]) / max(1, len(levels) - 1)
        return cls(len(losses), fmean(losses), level, spread)

    def merged(self, other: "Block") -> "Block":
        """Returns both as one."""
        num = self.num + other.num
        pairs = ((self.mean, other.mean), (self.level, other.level))
        mean, level = ((self.num * one + other.num * two) / num for one, two in pairs)
        inside = self.num * self.spread + other.num * other.spread
        between = self.num * (self.level - level) ** 2 + other.num * (other.level - level) ** 2
        return Block(num, mean, level, (inside + between) / num)


class Losses:
    """The losses of a run, and the first of them.

    Args:
        full_batch: Whether each is the loss over all rows, so that a single one counts.
    """

    def __init__(self, full_batch: bool) -> None:
        self._full_batch = full_batch
        self._blocks: list[Block] = []
        self.first: float | None = None
        self._early: list[float] = []

    def add(self, losses: Sequence[float], window: int) -> dict[str, float | None]:
        """Takes the finite losses since the last time, and returns those figures of an `Evidence` that they give."""
        if not losses:
            return {}
        if self.first is None:
            self.first = losses[0]
        recent = Block.of(losses)
        self._append(recent)
        self._early += losses[: EARLY + 1 - len(self._early)]
        best = min(self._blocks, key=lambda block: block.mean)
        half = len(losses) // 2
        rise = certainty([Block.of(losses[:half])], [Block.of(losses[half:])]) if half else 0.0
        late = self._blocks[len(self._blocks) // 2 :]
        middle = len(late) // 2
        return {
            "first_loss": self.first,
            "loss": losses[-1] if self._full_batch else recent.mean,
            "best_loss": min(best.mean, min(losses)) if self._full_batch else best.mean,
            "early_peak": max(self._early) / self._early[0] if min(self._early) > 0 else None,
            "early_growth": self._early_growth(),
            "loss_growth": certainty([best], [recent]),
            "loss_rise": rise,
            "loss_trend": certainty(late[:middle], late[middle:]) if middle else rise,
            "window_growth": losses[-1] / losses[-window] if len(losses) >= window and losses[-window] else None,
        }

    def _early_growth(self) -> float | None:
        """The largest early loss over the first; of batches less four standard deviations of the quietest block."""
        if min(self._early) <= 0:
            return None
        spreads = [block.spread for block in self._blocks if block.num >= 8]
        chance = 0.0 if self._full_batch else 4 * math.sqrt(min(spreads, default=math.inf))
        return math.exp(math.log(max(self._early) / self._early[0]) - chance)

    def _append(self, recent: Block) -> None:
        self._blocks.append(recent)
        if len(self._blocks) > MOST_BLOCKS:
            *pairs, newest = self._blocks
            self._blocks = [*(one.merged(two) for one, two in zip(pairs[::2], pairs[1::2], strict=True)), newest]

    def state_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {"first": self.first, "early": self._early, "blocks": [list(block) for block in self._blocks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes there."""
        self.first, self._early = state["first"], list(state["early"])
        self._blocks = [Block(*block) for block in state["blocks"]]


def certainty(before: Sequence[Block], after: Sequence[Block]) -> float:
    """Returns Welch's t: standard errors by which the later losses lie above the earlier."""
    one, other = reduce(Block.merged, before), reduce(Block.merged, after)
    error = math.sqrt(one.spread / one.num + other.spread / other.num)
    difference = other.level - one.level
    return difference / max(error, FEW + 1e-7 * abs(one.level)) if difference else 0.0
