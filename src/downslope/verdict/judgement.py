"""Evidence in, words out: how a training does at its learning rate, and which rate to try.

Pure: it knows neither Lightning nor Hydra, nor where the evidence comes from: `evidence` collects it.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from downslope.gradients.outlook import Outlook

Word = Literal["converged", "converging", "too_slow", "oscillating", "diverging", "stalled", "non_finite"]
WORDS: tuple[Word, ...] = get_args(Word)
Method = Literal["gradient_descent", "momentum", "nesterov", "adam", "other"]


@dataclass(frozen=True)
class Evidence:
    """What was seen of a training until now. *Window*: the last few successive steps; *recent*: since two judgements.

    What could not be measured is None; it is then left out of account.

    Attributes:
        step: Optimizer steps taken.
        planned_steps: How many there will be, where that is known.
        learning_rate: η of the last of them.
        method: What makes a step of a gradient.
        momentum: β, of momentum.
        num_non_finite: Losses and gradient norms seen that were NaN or infinite.
        first_loss: The first loss there was.
        loss: Mean of the recent losses.
        best_loss: The least such mean so far.
        loss_growth: Standard errors by which the logarithm of the loss now lies above that at the best.
        loss_rise: Standard errors by which the newer half of the recent losses lies above the older.
        loss_trend: The same of the later half of all losses.
        window_growth: Last loss of the window over its first.
        gradient_norm: ‖g‖, mean of the window.
        first_gradient_norm: Of the first window.
        gradient_ratio: ‖gₜ₊₁‖ / ‖gₜ‖, geometric mean over the window.
        gradient_decay: The same, at the present rate, over the last quarter of the time Σ η: what is slow shows only
            there, and a schedule's end is no convergence.
        gradient_cosine: Of successive gradients, mean of the window: +1 creeping, −1 bouncing.
        curvature: ⟨Δg, Δθ⟩ / ‖Δθ‖², along the steps of the window: on a parabola never above λ.
        largest_curvature: The largest one so far.
        full_batch: Whether every step sees all rows.
        noise_share: Share of ‖g‖² that differs from batch to batch: 0 for full batches.
        descent_ratio: Change of the loss in the window over the −Σ⟨g, Δθ⟩ that the gradient promised.
        gradient_excess: How many times the loss's slope the gradient is, where that can be told: 1 in a sound run.
        update_ratio: ‖Δθ‖ / ‖θ‖, mean of the window.
        left_to_gain: By how much the loss will still fall if the gradient goes on to fall as it does; where noise
            prevails, how far above its least it holds the loss.
        sharpness: λ, the largest eigenvalue of the Hessian, where it was measured.
        first_excess: Excess loss of a line's first weights.
        best_learning_rate: Which takes a line from there in the fewest steps of plain gradient descent on all rows.
        line: What the closed form says, for a line.
        without_gradient: Parameters that an optimizer holds and no gradient reached.
        zero_gradient: Parameters whose gradient was exactly zero throughout the window.
        frozen: Parameters that require no gradient, or that no optimizer holds.
        share_moving: Of all the module's elements, those whose gradient is not zero.
        leftover_gradient: Whether `backward` found the last step's gradient still there.
    """

    step: int
    learning_rate: float
    planned_steps: int | None = None
    method: Method = "gradient_descent"
    momentum: float = 0.0
    num_non_finite: int = 0
    first_loss: float | None = None
    loss: float | None = None
    best_loss: float | None = None
    loss_growth: float = 0.0
    loss_rise: float = 0.0
    loss_trend: float = 0.0
    window_growth: float | None = None
    gradient_norm: float | None = None
    first_gradient_norm: float | None = None
    gradient_ratio: float | None = None
    gradient_decay: float | None = None
    gradient_cosine: float | None = None
    curvature: float | None = None
    largest_curvature: float | None = None
    full_batch: bool = True
    noise_share: float = 0.0
    descent_ratio: float | None = None
    gradient_excess: float | None = None
    update_ratio: float | None = None
    left_to_gain: float | None = None
    sharpness: float | None = None
    first_excess: float | None = None
    best_learning_rate: float | None = None
    line: Outlook | None = None
    without_gradient: tuple[str, ...] = ()
    zero_gradient: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    share_moving: float = 1.0
    leftover_gradient: bool = False

    @property
    def horizon(self) -> int:
        """The steps that it has for its way: those planned, at least those taken."""
        return max(self.step, self.planned_steps or 0)

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


@dataclass(frozen=True)
class Thresholds:
    """Where one word ends and the next begins.

    Attributes:
        tolerance: Converged: what is left to gain is at most this share of what there was to gain. A thousandth is
            below what a curve of the loss shows.
        growth: Diverging: the loss has grown by this factor since its best, and still grows. An edge-of-stability
            network overshoots by some percent and comes back; a factor is no wobble, and leaves a finite loss of
            float32 another 10³⁰ to go.
        growth_certainty: … and by so many standard errors, which chance reaches once in 30,000 looks.
        far: Diverging, too: the loss is this many times the first one and grows.
        trend_certainty: A recent fall or rise is believed from so many standard errors on (once in 700 looks).
        bouncing: Oscillating: the mean cosine of successive gradients is below this. Independent batches give 0,
            overshooting −1; half way is twice the angle that chance makes of 8 steps.
        noisy: More than this share of ‖g‖² is noise: the mini-batches move the weights, not the slope.
        slow_factor: Too slow: more than this many times the steps planned (or taken) are still needed …
        slow_rate: … at less than this share of the largest stable rate: another rate would be as many times faster.
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
    slow_factor: float = 10.0
    slow_rate: float = 0.1
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


@dataclass(frozen=True)
class Suggestion:
    """A learning rate to try; None where theory has none. Why, in either case."""

    learning_rate: float | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """How a training does.

    Attributes:
        word: In one word.
        sentence: In a sentence to act on, the suggestion included where it is worth a change.
        suggestion: The rate to try.
        figures: What the verdict rests on.
        hints: Mistakes that have these symptoms.
    """

    word: Word
    sentence: str
    suggestion: Suggestion
    figures: dict[str, float] = field(default_factory=dict)
    hints: tuple[str, ...] = ()


def judge(evidence: Evidence, thresholds: Thresholds | None = None) -> Verdict:
    """Returns the verdict on what was seen.

    Example:
        Above the edge the gradient turns round at each step and grows:

        >>> seen = Evidence(60, 0.26, loss=9.0, best_loss=0.5, loss_growth=9.0, gradient_cosine=-1.0,
        ...     gradient_norm=7.0, gradient_ratio=1.06, window_growth=2.2, sharpness=8.0)
        >>> print(judge(seen).sentence)
        diverging: the loss is 18 × its best and grows, at 1.04 × the largest stable rate (0.25). Try lr=0.125.
    """
    limits = thresholds or Thresholds()
    hints = tuple(_hints(evidence, limits))
    word, why = _word(evidence, limits)
    suggestion = suggest(evidence, word, limits)
    sentence = f"{word}: {why}."
    for hint in hints:
        sentence += f" {hint[0].upper()}{hint[1:]}" + "." * (not hint.endswith("?"))
    if _is_worth_saying(evidence, word, suggestion, limits):
        sentence += f" Try lr={suggestion.learning_rate:.3g}."
    return Verdict(word, sentence, suggestion, _figures(evidence), hints)


def _word(seen: Evidence, limits: Thresholds) -> tuple[Word, str]:
    """The first word whose conditions are met, gravest first, and why."""
    if seen.num_non_finite:
        return "non_finite", "a loss or a gradient is NaN or infinite"
    if why := _why_stalled(seen, limits):
        return "stalled", why
    if _is_diverging(seen, limits):
        return "diverging", _why_diverging(seen)
    if _is_converged(seen, limits):
        return "converged", _why_converged(seen, limits)
    if why := _why_oscillating(seen, limits):
        return "oscillating", why
    if _is_too_slow(seen, limits):
        return "too_slow", _progress(seen, limits)
    return "converging", _progress(seen, limits)


def _why_stalled(seen: Evidence, limits: Thresholds) -> str | None:
    """No gradient, none but zeros, or one that moves nothing; not one that has shrunk on its way to the optimum."""
    if seen.gradient_norm is None:
        return "no gradient reaches any parameter" if seen.step else None
    if seen.gradient_norm > 0:
        arrived = seen.gradient_norm < limits.tolerance * (seen.first_gradient_norm or 0.0)
    else:  # rounding never makes all of a gradient zero, but a perfect fit does
        arrived = seen.loss is not None and abs(seen.loss) <= limits.tolerance * abs(seen.first_loss or 0.0)
    if seen.line is not None:
        arrived = seen.first_excess is not None and seen.line.excess <= limits.tolerance * seen.first_excess
    if seen.gradient_norm == 0 and not arrived:
        return "the gradient is exactly zero"
    if seen.update_ratio == 0 and seen.gradient_norm > 0 and not arrived:
        return f"the steps at lr={seen.learning_rate:.3g} are too short to change a weight"
    if seen.share_moving < 0.5 and seen.loss_trend > -limits.trend_certainty:
        return f"{1 - seen.share_moving:.0%} of the weights get no gradient, and the others have done what they can"
    return None


def _is_diverging(seen: Evidence, limits: Thresholds) -> bool:
    if seen.line is not None and seen.stability is not None and seen.stability > 1 + 1e-9:
        return seen.line.excess > 0  # on a parabola nothing can bring it back
    if seen.loss is None or seen.best_loss is None:
        return False
    # What has momentum swings, on a parabola up to where it began: only above that it has grown.
    best = seen.best_loss if seen.method == "gradient_descent" else max(seen.best_loss, seen.first_loss or -math.inf)
    has_grown = seen.loss - best > (limits.growth - 1) * abs(best)
    grows = (seen.gradient_ratio or 0) > 1 and (seen.window_growth or 0) > 1
    # Momentum beats: it swells and ebbs on its way down, so that a window alone tells nothing.
    lasts = seen.method == "gradient_descent" if seen.gradient_decay is None else seen.gradient_decay > 1
    bounces_out = grows and lasts and (seen.gradient_cosine or 0) < limits.bouncing
    overflows = seen.gradient_norm == math.inf
    far_out = (grows or overflows) and seen.first_loss is not None and seen.loss > limits.far * abs(seen.first_loss)
    is_rising = seen.loss_growth > limits.growth_certainty and seen.loss_rise > limits.trend_certainty
    return has_grown and (bounces_out or is_rising or far_out)


def _why_diverging(seen: Evidence) -> str:
    grown = "the loss grows"
    if seen.loss is not None and seen.best_loss and seen.loss > 1.05 * seen.best_loss:
        grown = f"the loss is {seen.loss / seen.best_loss:.3g} × its best and grows"
    elif seen.line is not None:
        grown = "the error along the steepest direction grows at every step"
    if seen.stability is not None and seen.limit is not None and seen.stability > 1:
        return f"{grown}, at {seen.stability:.3g} × the largest stable rate ({seen.limit:.3g})"
    return grown


def _left(seen: Evidence) -> tuple[float, float] | None:
    """(What is left to gain, what there was to gain), exactly for a line."""
    if seen.line is not None and seen.first_excess is not None:
        return seen.line.excess, seen.first_excess
    if seen.left_to_gain is None or seen.first_loss is None or seen.loss is None:
        return None
    return seen.left_to_gain, seen.first_loss - seen.loss + seen.left_to_gain


def _is_converged(seen: Evidence, limits: Thresholds) -> bool:
    left = _left(seen)
    return left is not None and math.isfinite(left[0]) and left[1] >= 0 and left[0] <= limits.tolerance * left[1]


def _why_converged(seen: Evidence, limits: Thresholds) -> str:
    exactly = "the closed form says that " if seen.line else ""
    return f"{exactly}less than {limits.tolerance:.1%} of what there was to gain is left"


def _why_oscillating(seen: Evidence, limits: Thresholds) -> str | None:
    falling = seen.loss_trend < -limits.trend_certainty
    if seen.leftover_gradient:
        return "each step follows the sum of all gradients so far, and swings past the optimum"
    overshoots = seen.full_batch or (seen.stability or 1.0) > 0.5  # else the two halves of an epoch look the same
    if seen.gradient_cosine is not None and seen.gradient_cosine < limits.bouncing and overshoots:
        state = "slowly" if falling else "hardly"
        where = f", at {seen.stability:.3g} × the largest stable rate" if seen.stability else ""
        return (
            f"successive gradients point against each other (cosine {seen.gradient_cosine:.2f}){where}: the weights "
            f"bounce across the valley, and the loss {state} falls"
        )
    if falling or (seen.gradient_decay or 1.0) < 1 - 1e-2:
        return None
    if _is_held_by_noise(seen, limits):
        return (
            f"the loss does not fall any more, and {seen.noise_share:.0%} of the gradient is the noise of its batches: "
            "the rate holds the weights at that distance"
        )
    if seen.best_loss is not None and seen.loss is not None and seen.loss > 1.1 * seen.best_loss:
        return f"the loss goes up and down, and is {seen.loss / seen.best_loss:.3g} × its best"
    return None


def _is_held_by_noise(seen: Evidence, limits: Thresholds) -> bool:
    """Whether noise prevails, and for a line also explains where it is (by a factor of 3): it may just be slow."""
    explained = seen.line is None or seen.left_to_gain is None or seen.line.excess < 3 * seen.left_to_gain
    return seen.noise_share > limits.noisy and explained and not _has_hardly_begun(seen)


def _has_hardly_begun(seen: Evidence) -> bool:
    """Whether even the steepest direction needs more steps than there are: ηλt < 1."""
    return seen.stability is not None and 2 * seen.horizon * seen.stability < 1


def num_steps_left(seen: Evidence, thresholds: Thresholds | None = None) -> float | None:
    """Returns the steps still needed until `tolerance`: exactly for a line under gradient descent, else as it goes."""
    limits = thresholds or Thresholds()
    if seen.line is not None and seen.method == "gradient_descent":
        return math.inf if seen.line.num_steps is None else float(seen.line.num_steps)
    left = _left(seen)
    if left is None or seen.gradient_decay is None or left[0] <= 0:
        return None
    if seen.gradient_decay >= 1:
        return math.inf
    target = limits.tolerance * max(left[1], 0.0)
    return math.inf if target == 0 else max(0.0, math.log(left[0] / target) / (-2 * math.log(seen.gradient_decay)))


def _is_too_slow(seen: Evidence, limits: Thresholds) -> bool:
    if seen.stability is not None and seen.stability > limits.slow_rate:
        # No constant rate is much quicker: it is the valley that is narrow.
        return seen.line is not None and (num_steps_left(seen, limits) or 0) > limits.hopeless_factor * seen.horizon
    if _has_hardly_begun(seen):
        return True
    if seen.line is None and seen.noise_share > limits.noisy:
        return False  # the decay of a noisy gradient tells nothing
    if seen.limit is None and (seen.gradient_cosine or 0) < 0.9:
        return False
    steps = num_steps_left(seen, limits)
    return steps is not None and steps > limits.slow_factor * seen.horizon


def _progress(seen: Evidence, limits: Thresholds) -> str:
    """How quickly it goes, along which direction, and how far there is to go."""
    parts = []
    if seen.line is not None and seen.method == "gradient_descent":
        shrinks = f"the error shrinks by {_percent(1 - seen.line.decay)} a step along its slowest direction"
        parts.append(f"{shrinks} ({seen.line.direction}, which holds {seen.line.share:.0%} of the excess loss)")
    elif seen.gradient_decay is not None and seen.gradient_decay < 1 and seen.noise_share <= limits.noisy:
        parts.append(f"the gradient shrinks by {_percent(1 - seen.gradient_decay)} a step")
    elif seen.loss_trend < 0:
        parts.append("the loss falls")
    else:
        parts.append("the loss has not begun to fall by more than chance")
    steps = num_steps_left(seen, limits) if seen.noise_share <= limits.noisy or seen.line else None
    if steps is not None and math.isfinite(steps):
        parts.append(f"about {_rounded(steps):,} more steps until {limits.tolerance:.1%} of the way is left")
    if seen.stability is not None and seen.stability < limits.slow_rate:
        parts.append(f"the rate is {seen.stability:.2g} × the largest stable one")
    if seen.line is not None and seen.line.condition_number > 1e4 and (seen.stability or 0) > limits.slow_rate:
        parts.append(
            f"the condition number is {seen.line.condition_number:.2g}, and no constant rate is much quicker: scale "
            "the features, or add momentum"
        )
    return "; ".join(parts)


def suggest(seen: Evidence, word: Word, thresholds: Thresholds | None = None) -> Suggestion:
    """Returns the rate to try, and why.

    On a parabola, with λ its largest curvature:

    - gradient descent: where the closed form is known the rate that needs the fewest steps, at most 2/(λ_max + λ_min),
      the best for the worst start; else 1/λ, half the limit, which needs at most twice the steps of the best.
    - momentum β: (1 + √β)²/λ, where the steepest direction stops being the slowest, below the limit 2(1 + β)/λ;
      Nesterov's: 1/λ.
    - Adam divides each gradient by its own recent size, so that its limit, 2(1 + β₁)/((1 − β₁)λ(P⁻¹H)), moves with
      the rate (38/η at β₁ = 0.9): theory has no best rate.
    - mini-batches: half of the above while the noise is not what holds the weights; then a tenth of the present rate,
      since the distance at which it holds them falls in proportion.

    Reference: Polyak (1964), Some methods of speeding up the convergence of iteration methods; Nesterov (2004),
    Introductory Lectures on Convex Optimization, section 2.1.5; Cohen et al. (2022), Adaptive gradient methods at the
    edge of stability; Bottou, Curtis and Nocedal (2018), Optimization methods for large-scale machine learning, 4.2.
    """
    limits = thresholds or Thresholds()
    if word == "stalled" or seen.leftover_gradient:
        return Suggestion(None, "no learning rate mends this")
    if word == "converged" and not seen.full_batch:
        return Suggestion(None, "none needed: a larger rate would hold the weights farther away")
    if seen.noise_share > limits.noisy and word == "oscillating":
        return Suggestion(seen.learning_rate / 10, "the noise of the batches holds the weights in proportion to it")
    if seen.method in ("adam", "other"):
        return Suggestion(None, "no suggestion: theory has no best rate for steps that are scaled by past gradients")
    if not seen.steepest:
        return Suggestion(None, "no suggestion: the curvature is not known")
    known = "λ" if seen.sharpness else "the largest curvature that its steps met"
    if seen.method == "momentum":
        rate, reason = (1 + math.sqrt(seen.momentum)) ** 2 / seen.steepest, f"(1 + √β)²/λ, with {known}"
    elif seen.method == "gradient_descent" and seen.full_batch and seen.best_learning_rate:
        rate = seen.best_learning_rate
        reason = "the closed form: no constant rate up to 2/(λ_max + λ_min) needs fewer steps from the first weights"
    else:
        rate, reason = 1 / seen.steepest, f"1/λ, with {known}: at most twice the steps of the best rate"
    if not seen.full_batch:
        rate, reason = rate / 2, f"half of {reason}: on mini-batches the limit is lower"
    if seen.sharpness and _is_not_of_this_loss(seen, limits):
        rate, reason = rate / (seen.gradient_excess or 1), f"for a gradient that is too long by as much: {reason}"
    return Suggestion(rate, reason)


def _is_worth_saying(seen: Evidence, word: Word, suggestion: Suggestion, limits: Thresholds) -> bool:
    if suggestion.learning_rate is None or word == "converged" or not seen.learning_rate:
        return False
    factor = suggestion.learning_rate / seen.learning_rate
    return word == "diverging" or not 1 / limits.worth_changing < factor < limits.worth_changing


def _hints(seen: Evidence, limits: Thresholds) -> list[str]:
    """Mistakes that leave these traces."""
    hints = []
    if seen.leftover_gradient:
        hints.append("the last step's gradient is still in `.grad` when the next one comes: is zero_grad() missing?")
    if seen.without_gradient:
        hints.append(f"no gradient reaches {_list(seen.without_gradient)}: detached, or not used by the loss?")
    if seen.zero_gradient:
        hints.append(f"the gradient of {_list(seen.zero_gradient)} is exactly zero: dead units, or a constant loss?")
    if seen.frozen:
        hints.append(f"{_list(seen.frozen)} is frozen: requires_grad is off, or no optimizer holds it")
    if _is_not_of_this_loss(seen, limits):
        hints.append(
            f"the gradient is about {seen.gradient_excess:.2g} × that of the loss: a sum over batches, not their mean?"
        )
    return hints


def _is_not_of_this_loss(seen: Evidence, limits: Thresholds) -> bool:
    return (seen.gradient_excess or 0.0) > limits.gradient_excess and not seen.leftover_gradient


def _figures(seen: Evidence) -> dict[str, float]:
    """The numbers of the evidence, those that were measured."""
    figures = {
        name: value
        for name, value in vars(seen).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if seen.line is not None:
        figures |= {"excess_loss": seen.line.excess, "condition_number": seen.line.condition_number}
    if seen.stability is not None:
        figures["stability"] = seen.stability
    if (steps := num_steps_left(seen)) is not None:
        figures["num_steps_left"] = steps
    return figures


def _list(names: tuple[str, ...], num_shown: int = 3) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:num_shown])
    return shown if len(names) <= num_shown else f"{shown} and {len(names) - num_shown} more"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _rounded(steps: float) -> int:
    """Two digits are all that is known."""
    digits = max(0, len(str(round(steps))) - 2)
    return round(round(steps), -digits)
