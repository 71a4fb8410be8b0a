"""What was seen of a training."""

import math
from dataclasses import dataclass

from downslope.gradients.outlook import Outlook
from downslope.verdict.method import Method


@dataclass(frozen=True)
class Evidence:
    """What was seen of a training until now. *Window*: the last few successive steps; *recent*: since two judgements.

    What could not be measured is None; it is then left out of account.
    """

    step: int  # optimizer steps taken
    learning_rate: float  # η of the last of them
    peak_learning_rate: float | None = None  # the largest until now: what a schedule is judged by
    planned_steps: int | None = None  # how many there will be, where that is known
    has_ended: bool = False  # whether this was the last step, planned or not
    method: Method = "gradient_descent"  # what makes a step of a gradient
    momentum: float = 0.0  # β
    full_batch: bool = True  # whether every step sees all rows

    num_non_finite: int = 0  # losses and gradients seen that were NaN or infinite
    first_loss: float | None = None
    loss: float | None = None  # mean of the recent ones; of full batches the last
    best_loss: float | None = None  # the least such mean so far
    early_peak: float | None = None  # largest of the first losses over the very first
    early_growth: float | None = None  # … beyond chance
    loss_growth: float = 0.0  # standard errors by which the logarithm of the loss now lies above that at the best
    loss_rise: float = 0.0  # the same of the newer half of the recent losses, above the older
    loss_trend: float = 0.0  # the same of the later half of all losses
    window_growth: float | None = None  # last loss of the window over its first

    gradient_norm: float | None = None  # ‖g‖, mean of the window
    first_gradient_norm: float | None = None  # of the first window
    gradient_ratio: float | None = None  # ‖gₜ₊₁‖ / ‖gₜ‖, geometric mean over the window
    # The same, at the present rate, over the last quarter of the time Σ η: what is slow shows only there, and a
    # schedule's end is no convergence.
    gradient_decay: float | None = None
    gradient_cosine: float | None = None  # of successive gradients, mean of the window: +1 creeping, −1 bouncing
    curvature: float | None = None  # ⟨Δg, Δθ⟩ / ‖Δθ‖² along the steps of the window: on a parabola never above λ
    largest_curvature: float | None = None  # the largest one so far
    noise_share: float = 0.0  # share of ‖g‖² that differs from batch to batch: 0 for full batches
    gradient_excess: float | None = None  # how many times the loss's slope the gradient is: 1 in a sound run
    update_ratio: float | None = None  # ‖Δθ‖ / ‖θ‖, mean of the window
    # By how much the loss will still fall if the gradient goes on to fall as it does; where noise prevails, how far
    # above its least it holds the loss.
    left_to_gain: float | None = None

    sharpness: float | None = None  # λ, the largest eigenvalue of the Hessian, where it was measured
    critical_learning_rate: float | None = None  # η_c, as measured last
    first_critical_learning_rate: float | None = None  # η_c, as measured first: after a jump the last tells nothing
    least_critical_learning_rate: float | None = None  # the least η_c measured
    early_critical_ratio: float | None = None  # the largest η/η_c of the first steps
    line: Outlook | None = None  # what the closed form says, for a line
    first_excess: float | None = None  # excess loss of a line's first weights
    best_learning_rate: float | None = None  # which takes a line from there in the fewest steps of gradient descent

    without_gradient: tuple[str, ...] = ()  # parameters that an optimizer holds and no gradient reached
    zero_gradient: tuple[str, ...] = ()  # … whose gradient was exactly zero throughout the window
    frozen: tuple[str, ...] = ()  # parameters that require no gradient, or that no optimizer holds: on purpose
    forgotten: tuple[str, ...] = ()  # … that get a gradient, though no optimizer holds them
    share_moving: float = 1.0  # of all elements that are trained, those whose gradient is not zero
    first_share_moving: float | None = None  # … in the first window: units can die
    leftover_gradient: bool = False  # whether `backward` found the last step's gradient still there
    share_changed: float | None = None  # of weights in half precision that have a gradient, those that a step changed

    constant_loss: float | None = None  # of the best output that ignores the inputs: the targets' entropy or variance
    squashed: str = ""  # how softmax or sigmoid stands in the wrong place
    broadcast: str = ""  # shapes of output and target, where the loss stretches the one
    is_maximised: bool = False
    clipped_norm: float = 0.0  # ‖g‖, where it was the same at every step of different batches
    decay_share: float = 0.0  # what weight decay was of the first steps
    steps_at_zero: int = 0  # steps since a schedule came to its end
    not_normalizing: tuple[str, ...] = ()  # batch normalisation that uses averages, and has none
    dropping: tuple[str, ...] = ()  # dropout that leaves next to nothing
    normalizes: bool = False  # whether any layer normalises
    input_size: float | None = None  # root mean square of the first batch that was judged
    broken_rows: str = ""  # of the batch that a flight recorder kept

    @property
    def horizon(self) -> int:
        """The steps that it has for its way: those planned, at least those taken."""
        return max(self.step, self.planned_steps or 0)

    @property
    def peak(self) -> float:
        """The largest rate until now."""
        return max(self.learning_rate, self.peak_learning_rate or 0.0)

    @property
    def critical(self) -> float | None:
        """η_c, half way between the latest and the least: a network is not as steep everywhere."""
        latest = self.critical_learning_rate
        return math.sqrt(latest * (self.least_critical_learning_rate or latest)) if latest else None

    @property
    def critical_ratio(self) -> float | None:
        """The peak over η_c: above 1 a step goes uphill."""
        return self.peak / self.critical if self.critical else None

    @property
    def steepest(self) -> float | None:
        """λ where it was measured; else the largest curvature that the steps met, which is at most λ."""
        return self.sharpness or self.largest_curvature

    @property
    def limit(self) -> float | None:
        """The largest stable learning rate on a parabola: 2/λ, with momentum 2(1 + β)/λ; None where theory has none.

        Nesterov's is 2(1 + β) / ((1 + 2β)λ): the roots of x² − (1 + β)(1 − ηλ)x + β(1 − ηλ) reach −1 there.
        """
        if not self.steepest:
            return None
        factors = {
            "gradient_descent": 1.0,
            "momentum": 1 + self.momentum,
            "nesterov": (1 + self.momentum) / (1 + 2 * self.momentum),
        }
        factor = factors.get(self.method)
        return None if factor is None else factor * 2 / self.steepest

    @property
    def stability(self) -> float | None:
        """η over the limit (for plain gradient descent ηλ/2): above 1, a parabola's loss grows."""
        return None if self.limit is None else self.learning_rate / self.limit
