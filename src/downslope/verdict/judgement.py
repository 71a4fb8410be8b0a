"""Evidence in, words out: how a training does at its learning rate.

Pure: it knows neither Lightning nor Hydra, nor where the evidence comes from.
"""

import math
from dataclasses import dataclass, field

from downslope.verdict.divergence import is_diverging, why_diverging, why_too_large
from downslope.verdict.evidence import Evidence
from downslope.verdict.hints import hints, listed
from downslope.verdict.suggestion import Suggestion, suggest
from downslope.verdict.thresholds import Thresholds, Word


@dataclass(frozen=True)
class Verdict:
    """How a training does.

    Attributes:
        word: In one word.
        sentence: In a sentence to act on, the suggestion included where it is worth a change.
        suggestion: The rate to try.
        override: What the sentence says to try, as this project's commands take it: `lr=0.1`, `scheduler=cosine`.
        figures: What the verdict rests on.
        hints: Mistakes that have these symptoms.
    """

    word: Word
    sentence: str
    suggestion: Suggestion
    override: str = ""
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
    word, why = _word(evidence, limits)
    named = hints(evidence, word, limits)
    suggestion = suggest(evidence, word, limits)
    sentence = f"{word}: {why}."
    if evidence.frozen and evidence.line is None:
        sentence += f" Frozen: {listed(evidence.frozen)}."
    for hint in named:
        sentence += f" {hint[0].upper()}{hint[1:]}" + "." * (not hint.endswith("?"))
    override = f"lr={suggestion.learning_rate:.3g}" if _is_worth_saying(evidence, word, suggestion, limits) else ""
    if suggestion.decay:
        is_constant = evidence.learning_rate > 0.9 * evidence.peak
        override = "scheduler=cosine" if is_constant else ""
        sentence += f" A {'decaying rate or a ' if is_constant else ''}larger batch would let it fall further."
    if override:
        sentence += f" Try {override}."
    return Verdict(word, sentence, suggestion, override, _figures(evidence), named)


def _word(seen: Evidence, limits: Thresholds) -> tuple[Word, str]:
    """The first word whose conditions are met, gravest first, and why."""
    if seen.num_non_finite:
        return "non_finite", "a loss or a gradient is NaN or infinite"
    diverges = is_diverging(seen, limits)
    if why := why_too_large(seen, limits, diverges):
        return "too_large", why
    if why := _why_stalled(seen, limits):
        return "stalled", why
    if diverges:
        return "diverging", why_diverging(seen)
    is_converged = _is_converged(seen, limits)
    if _is_far_below_critical(seen, limits) and (seen.noise_share > limits.noisy or not is_converged):
        return "too_slow", _progress(seen, limits)
    if is_converged:
        exactly = "the closed form says that " if seen.line else ""
        return "converged", f"{exactly}less than {limits.tolerance:.1%} of what there was to gain is left"
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
        left = limits.tolerance if not seen.frozen else 1.0  # … and so does the optimum of the few that are trained
        arrived = seen.loss is not None and abs(seen.loss) <= left * abs(seen.first_loss or 0.0)
    if seen.line is not None:
        arrived = seen.first_excess is not None and seen.line.excess <= limits.tolerance * seen.first_excess
    if seen.line is not None and seen.frozen and not arrived and _have_done_what_they_can(seen, limits):
        excess = seen.line.excess / (seen.first_excess or seen.line.excess)
        return f"what is trained has done what it can, and {excess:.0%} of the excess loss is left to what is frozen"
    if seen.gradient_norm == 0:
        return None if arrived else "the gradient is exactly zero"
    if seen.update_ratio == 0 and not arrived:
        return f"the steps at lr={seen.learning_rate:.3g} are too short to change a weight"
    if seen.share_moving < 0.5 and seen.loss_trend > -limits.trend_certainty:
        return f"{1 - seen.share_moving:.0%} of the weights get no gradient, and the others have done what they can"
    return None


def _have_done_what_they_can(seen: Evidence, limits: Thresholds) -> bool:
    """Whether next to nothing is left to gain along the gradients there are: a line's closed form knows of others."""
    left = math.inf if seen.left_to_gain is None else seen.left_to_gain
    return left <= limits.tolerance * (_gained(seen) + left)


def _gained(seen: Evidence) -> float:
    return (seen.first_loss or 0.0) - (seen.loss or 0.0)


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


def _why_oscillating(seen: Evidence, limits: Thresholds) -> str | None:
    falling = seen.loss_trend < -limits.trend_certainty
    if seen.leftover_gradient:
        return "each step follows the sum of all gradients so far, and swings past the optimum"
    overshoots = seen.full_batch or (seen.stability or 1.0) > 0.5  # else the two halves of an epoch look the same
    if falling and _is_weighed(seen):
        return None  # at the edge of stability a network trains well
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
            f"the loss has stopped falling, and {seen.noise_share:.0%} of the gradient is the noise of its batches: at "
            "this rate it keeps the weights away from the optimum"
        )
    if seen.best_loss is None or seen.loss is None:
        return None
    if seen.loss > 1.1 * seen.best_loss and not _is_next_to_nothing(seen, seen.loss - seen.best_loss, limits):
        return f"the loss goes up and down, and is {seen.loss / seen.best_loss:.3g} × its best"
    return None


def _is_weighed(seen: Evidence) -> bool:
    """Whether its rate was held against the critical one of mini-batches."""
    return seen.line is None and seen.critical_ratio is not None and not seen.full_batch


def _is_next_to_nothing(seen: Evidence, loss: float, limits: Thresholds) -> bool:
    """Whether a loss is little beside what was gained: a rate that is sound by η_c is not blamed for it."""
    return _is_weighed(seen) and loss < limits.held * _gained(seen)


def _is_held_by_noise(seen: Evidence, limits: Thresholds) -> bool:
    """Whether noise prevails, and for a line also explains where it is (by a factor of 3): it may just be slow."""
    explained = seen.line is None or seen.left_to_gain is None or seen.line.excess < 3 * seen.left_to_gain
    is_young = seen.line is not None and seen.line.young_share > 0.5
    if seen.left_to_gain is not None and _is_next_to_nothing(seen, seen.left_to_gain, limits):
        return False
    return seen.noise_share > limits.noisy and explained and not is_young and not _has_hardly_begun(seen, limits)


def _has_hardly_begun(seen: Evidence, limits: Thresholds) -> bool:
    """Whether even the steepest direction needs more steps than there are: ηλt < 1."""
    stability = _stability(seen, limits)
    return stability is not None and 2 * seen.horizon * stability < 1


def _stability(seen: Evidence, limits: Thresholds) -> float | None:
    """At the present rate; where noise prevails at the peak, since a schedule's end is there to quiet it."""
    if seen.stability is None or seen.limit is None or seen.noise_share <= limits.noisy:
        return seen.stability
    return seen.peak / seen.limit


def _is_far_below_critical(seen: Evidence, limits: Thresholds) -> bool:
    return seen.line is None and seen.critical_ratio is not None and seen.critical_ratio < limits.critical_share


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
    if seen.line is None and seen.critical_ratio is not None:
        return _is_far_below_critical(seen, limits)
    stability = _stability(seen, limits)
    if stability is not None and stability > limits.slow_rate:
        # No constant rate is much quicker: it is the valley that is narrow, not a schedule that has come to its end.
        at_the_peak = (num_steps_left(seen, limits) or 0) * seen.learning_rate / seen.peak
        return seen.line is not None and at_the_peak > limits.hopeless_factor * seen.horizon
    if _has_hardly_begun(seen, limits):
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
    if seen.learning_rate < 1e-3 * seen.peak:
        parts.append("the rate has decayed to almost nothing")
    elif seen.line is not None and seen.method == "gradient_descent":
        holds = f", which holds {seen.line.share:.0%} of the excess loss" if seen.line.share >= 0.005 else ""
        shrinks = f"the error shrinks by {_percent(1 - seen.line.decay)} a step along its slowest direction"
        parts.append(f"{shrinks} ({seen.line.direction}{holds})")
    elif seen.gradient_decay is not None and seen.gradient_decay < 1 and seen.noise_share <= limits.noisy:
        parts.append(f"the gradient shrinks by {_percent(1 - seen.gradient_decay)} a step")
    elif seen.loss_trend < 0:
        parts.append("the loss is still falling")
    else:
        parts.append("the loss has not begun to fall by more than chance")
    steps = num_steps_left(seen, limits) if seen.noise_share <= limits.noisy or seen.line else None
    if steps is not None and math.isfinite(steps):
        parts.append(f"about {_rounded(steps):,} more steps until {limits.tolerance:.1%} of the way is left")
    if seen.line is None and seen.critical_ratio is not None:
        parts.append(f"the rate is at most {seen.critical_ratio:.2g} × the critical one")
    share = seen.peak / seen.limit if seen.limit else 1.0  # a schedule's end is no rate to judge it by
    if share < limits.slow_rate and (seen.line is not None or seen.critical_ratio is None):
        parts.append(f"the rate is {share:.2g} × the largest stable one")
    if seen.line is not None and seen.line.condition_number > 1e4 and share > limits.slow_rate:
        parts.append(
            f"the condition number is {seen.line.condition_number:.2g}, and no constant rate is much faster: add "
            "momentum, or decorrelate the features"
        )
    return "; ".join(parts)


def _is_worth_saying(seen: Evidence, word: Word, suggestion: Suggestion, limits: Thresholds) -> bool:
    """Whether the rate is wrong, or a line's closed form knows a quicker one."""
    if suggestion.learning_rate is None or word == "converged" or not seen.learning_rate:
        return False
    if word == "converging" and seen.line is None:
        return False
    factor = suggestion.learning_rate / seen.learning_rate
    return word in ("diverging", "too_large") or not 1 / limits.worth_changing < factor < limits.worth_changing


def _figures(seen: Evidence) -> dict[str, float]:
    """The numbers of the evidence, those that were measured."""
    found = vars(seen) | {"critical_ratio": seen.critical_ratio, "stability": seen.stability}
    found["num_steps_left"] = num_steps_left(seen)
    if seen.line is not None:
        found |= {"excess_loss": seen.line.excess, "condition_number": seen.line.condition_number}
    return {name: value for name, value in found.items() if type(value) in (int, float)}


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def _rounded(steps: float) -> int:
    """Two digits are all that is known."""
    digits = max(0, len(str(round(steps))) - 2)
    return round(round(steps), -digits)
