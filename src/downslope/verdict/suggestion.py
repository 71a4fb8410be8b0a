"""Which learning rate to try next."""

import math
from dataclasses import dataclass

from downslope.verdict.evidence import Evidence
from downslope.verdict.hints import has_ended_early, is_not_of_this_loss, learns_nothing
from downslope.verdict.thresholds import Thresholds, Word

CRITICAL_SHARE = 1 / 6  # of η_c, from too slow: within twice the steps of the best of 12 rates in 205 of 232
FIRST_SHARE = 1 / 5  # of the first η_c, from too large: in 86 of 108
SAME = 1.05  # rates that are as near as this are one
TOO_LARGE: tuple[Word, ...] = ("diverging", "too_large", "non_finite")


@dataclass(frozen=True)
class Suggestion:
    """A learning rate to try, None where theory has none; why, in either case; and whether it had better decay."""

    learning_rate: float | None
    reason: str
    decay: bool = False


def suggest(seen: Evidence, word: Word, thresholds: Thresholds | None = None) -> Suggestion:
    """Returns the rate to try, and why: none that is in use, that was tried, or that goes the wrong way.

    Where the critical learning rate η_c was measured, η_c/6 from a rate that is too small; from one that is too large a
    fifth of the first η_c, since a jump leads to where it tells nothing, and at most a fifth of that rate: where a
    network begins it may be flatter than it comes to be. Else on a parabola, with λ its largest curvature:

    - gradient descent: where the closed form is known the rate that needs the fewest steps, at most 2/(λ_max + λ_min)
      and 3/(2λ); else 1/λ, half the limit, which needs at most twice the steps of the best.
    - momentum β: (1 + √β)²/λ, where the steepest direction stops being the slowest, below the limit 2(1 + β)/λ;
      Nesterov's: 1/λ. On mini-batches none: there it ruined 8 of 8 sound networks.
    - Adam divides each gradient by its own recent size, so that its limit, 2(1 + β₁)/((1 − β₁)λ(P⁻¹H)), moves with
      the rate (38/η at β₁ = 0.9): theory has no best rate.
    - mini-batches: half of the above, unless the run is sound. Where noise holds the weights, the distance falls with
      the rate: no constant one is right, but one that decays, or less noise.

    Reference: Kalra et al. (2026), arXiv 2601.16979; Polyak (1964), Some methods of speeding up the convergence of
    iteration methods; Nesterov (2004), Introductory Lectures on Convex Optimization, section 2.1.5; Cohen et al.
    (2022), Adaptive gradient methods at the edge of stability; Bottou, Curtis and Nocedal (2018), Optimization methods
    for large-scale machine learning, 4.2.
    """
    limits = thresholds or Thresholds()
    found = _found(seen, word, limits)
    if word in TOO_LARGE and (found.learning_rate or 0.0) > seen.peak:
        found = _of_the_critical_rate(seen, word)  # one batch can be far steeper than all rows are
    rate = found.learning_rate
    if rate is None:
        return found
    if seen.peak and 1 / SAME < rate / seen.peak < SAME:
        return Suggestion(None, "no suggestion: the rate that theory gives is already in use")
    if (word in TOO_LARGE and rate > seen.peak) or (word == "too_slow" and rate < seen.peak):
        return Suggestion(None, "no suggestion: what is known of the curvature contradicts the word")
    return found


def _found(seen: Evidence, word: Word, limits: Thresholds) -> Suggestion:
    is_mistaken = seen.leftover_gradient or seen.is_maximised or seen.broadcast or seen.broken_rows
    # What was thrown cannot show what it might have learned, and a line knows what there is to learn.
    is_lost = learns_nothing(seen) and word not in TOO_LARGE and seen.line is None
    if word == "stalled" or is_mistaken or has_ended_early(seen) or is_lost:
        return Suggestion(None, "no learning rate fixes this")
    if seen.method == "lbfgs":
        return Suggestion(None, "no suggestion: L-BFGS scales its steps itself")
    if seen.noise_share > limits.noisy and word == "oscillating":
        reason = "the noise of the batches holds the weights in proportion to any constant rate"
        return Suggestion(None, reason, decay=True)
    if seen.line is None and seen.critical_learning_rate:
        return _of_the_critical_rate(seen, word)
    if not seen.full_batch and word in ("converged", "converging"):
        return Suggestion(None, "none needed: a larger rate would hold the weights farther away")
    if seen.method in ("adam", "other"):
        return Suggestion(None, "no suggestion: theory has no best rate for steps that are scaled by past gradients")
    if seen.method != "gradient_descent" and not seen.full_batch:
        return Suggestion(None, "no suggestion: theory has no best rate for momentum on mini-batches")
    if not seen.steepest:
        return Suggestion(None, "no suggestion: the curvature is not known")
    return _of_the_curvature(seen, limits)


def _of_the_critical_rate(seen: Evidence, word: Word) -> Suggestion:
    first, known = seen.first_critical_learning_rate, seen.critical
    if word in TOO_LARGE and first:
        if seen.peak < first and (word != "non_finite" or FIRST_SHARE * first < seen.peak):
            return Suggestion(FIRST_SHARE * seen.peak, "a fifth of the rate in use, which is above the critical one")
        return Suggestion(FIRST_SHARE * first, "a fifth of the critical learning rate where it began")
    if word == "too_slow" and known and math.isfinite(known):
        return Suggestion(CRITICAL_SHARE * known, "a sixth of the critical learning rate")
    return Suggestion(None, "none needed")


def _of_the_curvature(seen: Evidence, limits: Thresholds) -> Suggestion:
    assert seen.steepest
    known = "λ" if seen.sharpness else "the largest curvature that its steps met"
    if seen.method == "momentum":
        rate, reason = (1 + math.sqrt(seen.momentum)) ** 2 / seen.steepest, f"(1 + √β)²/λ, with {known}"
    elif seen.method == "gradient_descent" and seen.full_batch and seen.best_learning_rate:
        rate = seen.best_learning_rate
        reason = "the closed form: no constant rate up to 3/(2λ) needs fewer steps from the first weights"
    else:
        rate, reason = 1 / seen.steepest, f"1/λ, with {known}: at most twice the steps of the best rate"
    if not seen.full_batch:
        rate, reason = rate / 2, f"half of {reason}: on mini-batches the limit is lower"
    if seen.sharpness and is_not_of_this_loss(seen, limits):
        rate, reason = rate / (seen.gradient_excess or 1), f"for a gradient that is too long by as much: {reason}"
    return Suggestion(rate, reason)
