"""The last few steps, watched closely: what products of gradients and steps say of curvature and noise."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from downslope.gradients.norms import HALF, norms
from downslope.gradients.sample import Sample

MOST = 2**18  # elements: of more a cosine is known to a few thousandths
FEW = 2**16  # elements that wait for their products: the vectors of a window, where they are short
ROUNDING = 1e-5  # in units of the weights' size, or of the first gradient's


class Row(NamedTuple):
    """Products of one step's vectors; 0 where a predecessor is missing."""

    square: float  # ‖gₜ‖²
    one: float  # ⟨gₜ, gₜ₋₁⟩
    two: float  # ⟨gₜ, gₜ₋₂⟩
    moved: float  # ‖Δθₜ‖²
    size: float  # ‖θₜ‖²
    promise: float  # ⟨gₜ, Δθₜ⟩
    after: float  # ⟨gₜ, Δθₜ₋₁⟩


class Window:
    """Watches successive steps, and keeps seven products of each on its device until it is asked.

    Of many elements the products are those of a `Sample`: gradients and steps are kept of it alone.
    """

    def __init__(self) -> None:
        self._sample = Sample((), MOST)
        self.moved: list[Parameter] = []
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.num_steps = 0
        self._waiting: list[tuple[Tensor, Tensor, list[float]]] = []  # gradient, parameters after the step, and decays
        self._products: list[Tensor] = []  # row after row
        self._last: list[Tensor] = []  # the last two gradients, the last step, and the parameters after it
        self._largest: list[Tensor] = []  # none or one: of each element of a gradient, or of a sample's each parameter
        self._changed: list[Tensor] = []  # of weights in half precision: how many changed, how many had a gradient

    def add(self, held: Sequence[Parameter], decays: Sequence[float]) -> None:
        """Takes a step that was just made: θₜ₊₁ in place, and in `.grad` what was applied.

        Args:
            held: The optimizer's parameters.
            decays: What it adds of each to its gradient: g + wθ is the gradient of what it minimises.
        """
        moved = [parameter for parameter in held if parameter.grad is not None]
        if not self._sample.is_of(moved):
            self.clear()  # another set of parameters has a gradient now
            self.moved, self._sample = moved, Sample(moved, MOST)
        self.num_steps += 1
        if not moved:
            return
        gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
        if not self.is_whole:
            self._keep_largest(norms(gradients, math.inf))
        pairs = zip(decays, held, strict=True) if any(decays) else ()
        of_moved = [decay for decay, each in pairs if each.grad is not None]
        gradient, parameters = self._sample.weighted(gradients), self._sample.weighted(moved)
        self._waiting.append((gradient, parameters, of_moved))
        if len(self._waiting) * len(gradient) > FEW:
            self._multiply()

    def _multiply(self) -> None:
        """Works on the steps that wait: of few elements on a whole window at once, while all that takes is at hand."""
        for gradient, parameters, decays in self._waiting:
            if self.is_whole:
                self._keep_largest(gradient.abs())
            last, before_last, last_step, start = self._last or [*3 * [torch.zeros_like(gradient)], parameters]
            step = parameters - start
            if decays:
                parts = zip(self._sample.places, start.split(self._sample.sizes), strict=True)
                gradient += torch.cat([decays[place] * part for place, part in parts])
            if self.moved[0].dtype in HALF and self._last:
                self._changed.append(torch.stack([step.count_nonzero(), gradient.count_nonzero()]))
            pairs = [(gradient, gradient), (gradient, last), (gradient, before_last), (step, step), (start, start)]
            pairs += [(gradient, step), (gradient, last_step)]
            self._products += [torch.dot(one, other) for one, other in pairs]
            self._last = [gradient, last, step, parameters]
        self._waiting.clear()

    def _keep_largest(self, values: Tensor) -> None:
        self._largest = [torch.maximum(self._largest[0], values) if self._largest else values]

    def rows(self) -> list[Row]:
        """Returns the products of each step, by one synchronisation."""
        self._multiply()
        products = torch.stack(self._products).cpu().double().tolist() if self._products else []
        return [Row(*each) for each in zip(*[iter(products)] * len(Row._fields), strict=True)]

    def largest(self) -> list[float]:
        """Returns the largest element that each moved parameter's gradient had."""
        self._multiply()
        if self._largest and self.is_whole:
            return norms(self._largest[0].split(self._sample.sizes), math.inf).tolist()
        return self._largest[0].tolist() if self._largest else []

    def share_changed(self) -> float | None:
        """Returns how many of the weights that have a gradient a step changed: half precision may be too coarse."""
        if not self._changed:
            return None
        changed, asked = torch.stack(self._changed).sum(0).tolist()
        return float(changed / asked) if asked else None

    @property
    def is_whole(self) -> bool:
        """Tells whether it sees every element."""
        return self._sample.is_whole

    @property
    def last_step(self) -> tuple[Tensor, Tensor]:
        """The last gradient, and the parameters that it was taken at."""
        return self._last[0], self._last[3] - self._last[2]

    def state_dict(self, held: Sequence[Parameter]) -> dict[str, Any]:
        """Returns plain data and tensors; parameters by their place among those held."""
        self._multiply()
        moved = {*map(id, self.moved)}
        return {
            "num_steps": self.num_steps,
            "moved": [index for index, parameter in enumerate(held) if id(parameter) in moved],
            "tensors": [self._products, self._last, self._largest],
        }

    def load_state_dict(self, state: dict[str, Any], held: Sequence[Parameter]) -> None:
        """Resumes there."""
        self.num_steps, self.moved = state["num_steps"], [held[index] for index in state["moved"]]
        self._sample = Sample(self.moved, MOST)
        self._products, self._last, self._largest = (
            [tensor.to(held[0].device) for tensor in tensors] for tensors in state["tensors"]
        )
        if any(len(vector) != sum(self._sample.sizes) for vector in self._last):
            raise ValueError("the gradients are of other elements")
        if any(each.ndim for each in self._products):  # rows, as they once were: this window begins anew
            self.clear()


def cosine(rows: Sequence[Row], lag: int) -> float | None:
    """Returns the mean cosine of gradients 1 or 2 steps apart; None where there are none."""
    products = [row.one if lag == 1 else row.two for row in rows[lag:]]
    sizes = [math.sqrt(one.square) * math.sqrt(other.square) for one, other in zip(rows, rows[lag:], strict=False)]
    cosines = [product / size for product, size in zip(products, sizes, strict=True) if size > 0]
    return max(-1.0, min(1.0, fmean(cosines))) if cosines else None


def noise_share(rows: Sequence[Row]) -> float:
    """Returns which share of ‖g‖² differs from batch to batch.

    A step that overshoots turns the gradient round, and the next one back: noise does not come back.
    """
    first, second = cosine(rows, 1), cosine(rows, 2)
    bounces = first is not None and first < -0.8 and (second or 0.0) > 0.8
    return 0.0 if first is None or bounces else 1 - max(0.0, first)


def curvature(rows: Sequence[Row], first_norm: float) -> float | None:
    """Returns the median of ⟨gₜ − gₜ₋₁, Δθₜ₋₁⟩ / ‖Δθₜ₋₁‖²: on a parabola never above λ.

    Shorter steps than `ROUNDING` of the weights, and gradients of the first, would drown in the rounding of float32.
    """
    curvatures = [
        (row.after - last.promise) / last.moved
        for last, row in pairwise(rows)
        if row.square > (ROUNDING * first_norm) ** 2 and last.moved > ROUNDING**2 * row.size
    ]
    return median(curvatures) if curvatures else None


def gradient_ratio(rows: Sequence[Row]) -> float | None:
    """Returns the geometric mean of ‖gₜ₊₁‖ / ‖gₜ‖."""
    ratios = [later.square / earlier.square for earlier, later in pairwise(rows) if earlier.square and later.square]
    return math.exp(fmean(map(math.log, ratios)) / 2) if ratios else None


def update_ratio(rows: Sequence[Row]) -> float | None:
    """Returns the root mean square of ‖Δθ‖ over that of ‖θ‖; the first step of a window is not known."""
    size = fmean(row.size for row in rows)
    return math.sqrt(fmean(row.moved for row in rows[1:]) / size) if size and len(rows) > 1 else None


def decay_share(rows: Sequence[Row], within: float, apart: float) -> float:
    """Returns what weight decay is of a step: w‖θ‖ of ‖g + wθ‖ within the gradient, ηw‖θ‖ of ‖Δθ‖ apart from it."""
    shares = [
        within * math.sqrt(row.size / row.square) if within else apart * math.sqrt(row.size / row.moved)
        for row in rows
        if row.square and row.moved
    ]
    return median(shares) if shares else 0.0


def descent_ratio(rows: Sequence[Row], losses: Sequence[float]) -> float | None:
    """Returns what the steps changed the loss by, over what the gradient promised; the last one's is not known."""
    if not len(losses) >= len(rows) > 2:
        return None
    change = losses[-1] - losses[-len(rows) + 1]
    promise = sum(row.promise for row in rows[1:-1])
    return change / promise if promise < 0 and abs(change) > 1e-4 * abs(losses[-1]) else None
