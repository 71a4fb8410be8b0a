"""The words, and where one ends and the next begins."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Word = Literal["converged", "converging", "too_slow", "too_large", "oscillating", "diverging", "stalled", "non_finite"]
WORDS: tuple[Word, ...] = get_args(Word)


@dataclass(frozen=True)
class Thresholds:
    """Where one word ends and the next begins.

    Attributes:
        tolerance: Converged: what is left to gain is at most this share of what there was to gain. A thousandth is
            below what a curve of the loss shows.
        growth: Diverging: the loss has grown by this factor since its best, and still grows. An edge-of-stability
            network overshoots by some percent and comes back; a factor is no wobble, and leaves a finite loss of
            float32 another 10³⁰ to go.
            Too large: … by this factor within the first steps, beyond what chance makes of it.
        growth_certainty: … and by so many standard errors, which chance reaches once in 30,000 looks.
        far: Diverging, too: the loss is this many times the first one and grows.
        trend_certainty: A recent fall or rise is believed from so many standard errors on (once in 700 looks).
        bouncing: Oscillating: the mean cosine of successive gradients is below this. Independent batches give 0,
            overshooting −1; half way is twice the angle that chance makes of 8 steps.
        noisy: More than this share of ‖g‖² is noise: the mini-batches move the weights, not the slope.
        held: Oscillating, where the critical rate was measured: noise holds the loss by more than this share of what
            was gained above its least. A curve of the loss hardly shows less.
        slow_factor: Too slow: more than this many times the steps planned (or taken) are still needed …
        slow_rate: … at less than this share of the largest stable rate: another rate would be as many times faster.
        critical_share: Too slow, where the critical learning rate was measured: the largest rate until now is below
            this share of it, as 228 of 232 slow and 1 of 137 sound runs of small networks were.
        hopeless_factor: Too slow, too, whatever the rate: a line that needs so many times the steps planned, since one
            direction is that much flatter than another. Nobody waits for a thousand times as long.
        gradient_excess: The gradient is more than that many times the loss's slope: then it is not of this loss. The
            least that a sum instead of a mean does is 2.
        worth_changing: A suggestion is said aloud if it differs from η by this factor.
    """

    tolerance: float = 1e-3
    growth: float = 2.0
    growth_certainty: float = 4.0
    far: float = 100.0
    trend_certainty: float = 3.0
    bouncing: float = -0.5
    noisy: float = 0.5
    held: float = 0.05
    slow_factor: float = 10.0
    slow_rate: float = 0.1
    critical_share: float = 0.02
    hopeless_factor: float = 1000.0
    gradient_excess: float = 1.8
    worth_changing: float = 1.25

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value) or (value <= 0 and name != "bouncing"):
                raise ValueError(f"`{name}` must be a finite number greater than 0, got {value!r}.")
        if not -1 < self.bouncing < 0:
            raise ValueError(f"`bouncing` must lie between -1 and 0, got {self.bouncing!r}.")
        if self.growth <= 1:
            raise ValueError(f"`growth` must be greater than 1, got {self.growth!r}.")
