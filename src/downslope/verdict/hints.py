"""Mistakes by name: a hint says what was seen, and asks."""

from downslope.verdict.evidence import Evidence
from downslope.verdict.thresholds import Thresholds, Word

LARGE_INPUTS = 10.0  # in units of what initial weights are made for
CONSTANT = 0.95  # of the loss of a constant output: less than that has been learned
PATIENCE = 100  # steps in which what can be learned shows itself


def hints(seen: Evidence, word: Word, limits: Thresholds) -> tuple[str, ...]:
    """Returns the mistakes that leave these traces."""
    is_unhappy = word not in ("converging", "converged")
    without_gradient = tuple(name for name in seen.without_gradient if name not in seen.forgotten)
    excess, constant = seen.gradient_excess or 0.0, seen.constant_loss or 0.0
    changed = 1.0 if seen.share_changed is None else seen.share_changed
    lines = {
        "the last step's gradient is still in `.grad` when the next one comes: is zero_grad() missing?": (
            seen.leftover_gradient
        ),
        f"no gradient reaches {listed(without_gradient)}: detached, or not used by the loss?": without_gradient,
        f"the gradient of {listed(seen.zero_gradient)} is exactly zero: dead units, or a constant loss?": (
            seen.zero_gradient and word != "converged"
        ),
        f"{listed(seen.frozen)} is frozen, and the closed form is that of all weights: on purpose?": (
            seen.frozen and seen.line is not None
        ),
        f"no optimizer holds {listed(seen.forgotten)}: replaced after the optimizer was made?": seen.forgotten,
        f"the gradient is about {excess:.2g} × that of the loss: a sum over batches, not their mean?": (
            is_not_of_this_loss(seen, limits)
        ),
        seen.squashed: seen.squashed,
        f"the loss compares {seen.broadcast}, each row with every other: is a squeeze() missing?": seen.broadcast,
        "what is minimised is the negative of a loss: is a sign wrong?": seen.is_maximised,
        f"the loss is that of a constant output ({constant:.3g}): do the targets belong to these inputs?": (
            word not in ("too_large", "diverging") and learns_nothing(seen)
        ),
        f"the inputs are of size {seen.input_size or 0:.2g}, and nothing normalises them: should they be scaled?": (
            is_unhappy and (seen.input_size or 0.0) > LARGE_INPUTS and not seen.normalizes
        ),
        f"each step's gradient has the norm {seen.clipped_norm:.3g}: is clipping that tight on purpose?": (
            seen.clipped_norm and word == "too_slow"
        ),
        f"weight decay is {seen.decay_share:.0%} of the first steps: is it meant to outweigh the loss?": (
            seen.decay_share > 0.5
        ),
        f"the schedule has been at its end for {seen.steps_at_zero} of {seen.horizon} steps: is it too short?": (
            has_ended_early(seen)
        ),
        f"in half precision a step changes {changed:.0%} of the weights: is that too coarse?": changed < 0.5,
        f"{listed(seen.not_normalizing)} is in eval mode, and its running averages have seen no batch: on purpose?": (
            seen.not_normalizing
        ),
        f"{listed(seen.dropping)} leaves at most a tenth: on purpose?": seen.dropping,
        f"{seen.broken_rows}: should it be left out?": seen.broken_rows,
    }
    return tuple(line for line, is_seen in lines.items() if is_seen)


def learns_nothing(seen: Evidence) -> bool:
    """Tells whether the weights have gone far, and the loss is still that of a constant output; a line's least loss."""
    if seen.constant_loss is None or seen.loss is None or seen.squashed or seen.broadcast or seen.step < PATIENCE:
        return False
    way = seen.step * (seen.update_ratio or 0.0)
    least = seen.loss - (seen.line.excess if seen.line else 0.0)
    return least > CONSTANT * seen.constant_loss > 0 and way > 0.3


def has_ended_early(seen: Evidence) -> bool:
    """Tells whether a schedule was at its end for a good part of the run."""
    return seen.steps_at_zero > 0.2 * seen.horizon


def is_not_of_this_loss(seen: Evidence, limits: Thresholds) -> bool:
    """Tells whether the gradient is too long for the loss that is logged."""
    return (seen.gradient_excess or 0.0) > limits.gradient_excess and not seen.leftover_gradient


def listed(names: tuple[str, ...], num_shown: int = 3) -> str:
    """Returns the first names, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:num_shown])
    return shown if len(names) <= num_shown else f"{shown} and {len(names) - num_shown} more"
