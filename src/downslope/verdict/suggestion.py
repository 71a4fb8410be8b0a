"""Which learning rate to try next."""

import math
from dataclasses import dataclass

from downslope.verdict.evidence import Evidence
from downslope.verdict.hints import is_not_of_this_loss
from downslope.verdict.thresholds import Thresholds, Word


@dataclass(frozen=True)
class Suggestion:
    """A learning rate to try; None where theory has none. Why, in either case."""

    learning_rate: float | None
    reason: str


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
    return _of_the_curvature(seen, limits)


def _of_the_curvature(seen: Evidence, limits: Thresholds) -> Suggestion:
    assert seen.steepest
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
    if seen.sharpness and is_not_of_this_loss(seen, limits):
        rate, reason = rate / (seen.gradient_excess or 1), f"for a gradient that is too long by as much: {reason}"
    return Suggestion(rate, reason)
