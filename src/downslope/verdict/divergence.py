"""Does the loss run away, or did the first steps throw it?"""

import math

from downslope.verdict.evidence import Evidence
from downslope.verdict.losses import EARLY
from downslope.verdict.thresholds import Thresholds

NEARLY_CRITICAL = 0.3  # between two measurements η_c may be less than at either
NEARLY_HELD = 0.7
RECOVERED = 20  # what came down to a twentieth of where it began was not thrown away; what was has a third of it left
ROUNDING = 1e-10  # of the first loss: residuals in float32 are no smaller, and what is left of them is chance
LONG = 100  # steps after which a loss that does not fall has come to rest


def why_too_large(seen: Evidence, limits: Thresholds, diverges: bool) -> str | None:
    """Returns how the rate threw it away from where it began, wherever it then went; None where it did not.

    While it diverges that is said, and this at the end.
    """
    early = seen.early_critical_ratio
    if diverges:
        is_by_the_rate = (seen.stability or 0) > 1 or (early or 0) > 1 or _was_thrown(seen, limits)
        return why_diverging(seen) if seen.has_ended and is_by_the_rate else None
    where = f", at {early:.2g} × the critical learning rate" if early else ""
    if _was_thrown(seen, limits):
        return f"the first steps threw the loss to {seen.early_growth:.2g} × where it began{where}"
    is_uphill = (early or 0) > 1 and seen.line is None and _has_not_come_down(seen, 1.25)
    if is_uphill and (seen.step >= 2 * EARLY or (seen.early_peak or 0) > limits.growth):
        return f"the first steps went uphill{where}, and the loss has not come down since"
    if (early or 0) > NEARLY_HELD and seen.step >= LONG and _rests_high(seen, limits):
        return f"noise holds the loss at {seen.loss or 0:.3g}, from {seen.first_loss or 0:.3g}{where}"
    is_still = seen.share_moving < 0.5 < (seen.first_share_moving or 0) and _has_not_come_down(seen, RECOVERED)
    if (early or 0) > NEARLY_CRITICAL and is_still:  # and has not just fitted all rows
        return f"a step killed units{where}: {1 - seen.share_moving:.0%} of the weights no longer have a gradient"
    return None


def _rests_high(seen: Evidence, limits: Thresholds) -> bool:
    """Whether the noise of a rate near the critical one holds a network's loss little below where it began."""
    is_held = seen.line is None and seen.noise_share > limits.noisy and seen.loss_trend > -limits.trend_certainty
    gained = (seen.first_loss or 0.0) - (seen.loss or 0.0)
    by_noise = seen.left_to_gain is not None and seen.left_to_gain > limits.held * gained
    return is_held and by_noise and _has_not_come_down(seen, 1 / 0.35)


def _was_thrown(seen: Evidence, limits: Thresholds) -> bool:
    """Whether the first steps raised the loss, uphill as far as known or so that it has not come back.

    The limit of a parabola that is known says more: momentum's first step may overshoot there, and all is well.
    """
    if seen.line is not None or (seen.early_growth or 0) <= limits.growth:
        return False
    # λ where it was thrown to tells nothing of where it began, which η_c was measured at.
    is_stable = seen.sharpness is not None and (seen.stability or 2) <= 1 and seen.early_critical_ratio is None
    is_by_the_rate = (seen.early_critical_ratio or 0) > 1 and _has_not_come_down(seen, RECOVERED)
    return is_by_the_rate or (not is_stable and _has_not_come_down(seen, limits.growth))


def _has_not_come_down(seen: Evidence, factor: float) -> bool:
    """Whether the loss is not yet below the first by such a factor: a plateau of dead units lies a little lower."""
    return seen.loss is not None and seen.first_loss is not None and seen.loss > seen.first_loss / factor


def is_diverging(seen: Evidence, limits: Thresholds) -> bool:
    """Tells whether the loss grows, and not just wobbles; a line's does from the limit on."""
    if seen.line is not None and seen.stability is not None and seen.stability > 1 + 1e-9:
        return seen.line.excess > 0  # on a parabola nothing can bring it back
    is_rising = seen.loss_growth > limits.growth_certainty and seen.loss_rise > limits.trend_certainty
    return _has_grown(seen, limits) and (is_rising or _bounces_out(seen, limits) or _is_far_out(seen, limits))


def _has_grown(seen: Evidence, limits: Thresholds) -> bool:
    if seen.loss is None or seen.best_loss is None or abs(seen.loss) < ROUNDING * abs(seen.first_loss or 0.0):
        return False
    # What has momentum swings, on a parabola up to where it began: only above that it has grown.
    best = seen.best_loss if seen.method == "gradient_descent" else max(seen.best_loss, seen.first_loss or -math.inf)
    return seen.loss - best > (limits.growth - 1) * abs(best)


def _grows(seen: Evidence) -> bool:
    return (seen.gradient_ratio or 0) > 1 and (seen.window_growth or 0) > 1


def _bounces_out(seen: Evidence, limits: Thresholds) -> bool:
    # Momentum beats: it swells and ebbs on its way down, so that a window alone tells nothing.
    lasts = seen.method == "gradient_descent" if seen.gradient_decay is None else seen.gradient_decay > 1
    return _grows(seen) and lasts and (seen.gradient_cosine or 0) < limits.bouncing


def _is_far_out(seen: Evidence, limits: Thresholds) -> bool:
    if seen.loss is None or seen.first_loss is None or not (_grows(seen) or seen.gradient_norm == math.inf):
        return False
    return seen.loss > limits.far * abs(seen.first_loss)


def why_diverging(seen: Evidence) -> str:
    """Returns how much, and how far above the limit."""
    grown = "the loss grows"
    if seen.loss is not None and seen.best_loss and seen.loss > 1.05 * seen.best_loss:
        grown = f"the loss is {seen.loss / seen.best_loss:.3g} × its best and grows"
    elif seen.line is not None:
        grown = "the error along the steepest direction grows at every step"
    if seen.stability is not None and seen.limit is not None and seen.stability > 1:
        return f"{grown}, at {seen.stability:.3g} × the largest stable rate ({seen.limit:.3g})"
    return grown
