"""What the verdict rests on, collected from the steps of any training loop: torch alone.

collector = EvidenceCollector(optimizer, names)
for batch in batches:
loss = …; optimizer.zero_grad(); loss.backward(); optimizer.step()
collector.add_loss(loss)
collector.add_step()
if collector.is_due:
print(judge(collector.evidence()).sentence)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median, variance
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, NAdam, Optimizer, RAdam, RMSprop

from downslope.gradients.least_squares import LeastSquares
from downslope.gradients.norms import norms
from downslope.gradients.outlook import Outlook, best_learning_rate, outlook
from downslope.verdict import Evidence, Method

FIRST_JUDGEMENTS = (8, 16, 32)  # at 10 × the limit float32 overflows after some 30 steps
MOST_BLOCKS = 256
FEW = 1e-12
ROUNDING = 1e-5  # in units of the weights' size, or of the first gradient's


class Block(NamedTuple):
    """The losses between two judgements: how many, their mean, and mean and variance of their logarithms."""

    num: int
    mean: float
    level: float
    spread: float


class Glance(NamedTuple):
    """‖g‖ at a judgement, and the time until then: Σ η over the steps."""

    step: int
    norm: float
    time: float


@dataclass
class Watched:
    """What a step of the window leaves on the device: squares and products, 0 where a predecessor is missing."""

    products: Tensor
    gradient_norms: Tensor | None


class EvidenceCollector:
    """Watches the last `window` steps before each judgement closely, and of all others only keeps the loss.

    Losses and products stay on their device until `evidence` is asked, once for all: the only synchronisation.

    Args:
        optimizer: Whose steps are watched.
        names: Of its parameters, by id.
        every_n_steps: Steps between two judgements; the first ones come after 8, 16 and 32.
        window: Steps that are watched before each.
        full_batch: Whether every step sees all rows, so that nothing but the steps changes the gradient.
        step: Optimizer steps taken already.
        last_step: Where training is to end, as far as that is known; one more judgement comes there.

    Attributes:
        step: Steps taken.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        every_n_steps: int = 50,
        window: int = 8,
        full_batch: bool = False,
        step: int = 0,
        last_step: int | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.step = step
        self._last_step = last_step
        self._others = sorted({*FIRST_JUDGEMENTS, *([] if last_step is None else [last_step])})
        self._line: LeastSquares | None = None
        self._first_excess: float | None = None
        self._best_learning_rate: float | None = None
        self._names = names
        self._every_n_steps = every_n_steps
        self._window = window
        self._full_batch = full_batch
        self._losses: list[Tensor] = []
        self._blocks: list[Block] = []
        self._history: list[Glance] = []
        self._first_loss: float | None = None
        self._largest_curvature: float | None = None
        self._rate, self._time = _rate(optimizer), 0.0
        self._gradient_excess: float | None = None
        self._leftover: Tensor | None = None
        self._begin_window()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know of its beginning: plain data."""
        return {
            "blocks": [list(block) for block in self._blocks],
            "history": [list(glance) for glance in self._history],
            "first_loss": self._first_loss,
            "first_excess": self._first_excess,
            "best_learning_rate": self._best_learning_rate,
            "largest_curvature": self._largest_curvature,
            "time": self._time,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._blocks = [Block(*block) for block in state["blocks"]]
        self._history = [Glance(*glance) for glance in state["history"]]
        self._first_loss, self._first_excess = state["first_loss"], state["first_excess"]
        self._best_learning_rate = state["best_learning_rate"]
        self._largest_curvature, self._time = state["largest_curvature"], state["time"]

    def set_line(
        self, line: LeastSquares, parameters: Sequence[Tensor], tolerance: float, names: Sequence[str] = ()
    ) -> None:
        """Takes a line's closed form, to hold the weights against it: at the first step, or where a run is resumed.

        Args:
            line: Over all rows that are trained on.
            parameters: The module's, weight then bias.
            tolerance: Share of the first excess loss at which it has arrived.
            names: Of the features.
        """
        weights = _flat([parameter.detach() for parameter in parameters])
        if len(weights) != len(line.parameters):
            return
        self._line, self._line_parameters, self._line_names = line, parameters, names
        if self._first_excess is None:
            self._first_excess = outlook(line, weights, 0.0, 0.0).excess
            self._best_learning_rate = best_learning_rate(line, weights, tolerance * self._first_excess)
        self._target = tolerance * self._first_excess

    def _outlook(self, learning_rate: float) -> Outlook | None:
        if self._line is None:
            return None
        weights = _flat([parameter.detach() for parameter in self._line_parameters])
        return outlook(self._line, weights, learning_rate, self._target, self._line_names)

    def _begin_window(self) -> None:
        self._watched: list[Watched] = []
        self._gradients: list[Tensor] = []  # the last two
        self._parameters: list[Tensor] = []
        self._missing: set[str] = set()

    @property
    def is_due(self) -> bool:
        """Tells whether the step that was taken last ends a window."""
        return self.step % self._every_n_steps == 0 or self.step in self._others

    @property
    def is_watching(self) -> bool:
        """Tells whether the next step is one of a window."""
        nearest = -(-(self.step + 1) // self._every_n_steps) * self._every_n_steps
        due = min([nearest, *(step for step in self._others if step > self.step)])
        return due - self.step <= self._window

    def add_loss(self, loss: Tensor) -> None:
        """Takes the loss of a batch, before its step."""
        self._losses.append(loss.detach())

    def add_leftover(self) -> None:
        """Takes the gradients that `backward` finds when it begins a new step: they should be gone, or zero."""
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        left = [parameter.grad for parameter in held if parameter.grad is not None]
        if left:
            self._leftover = norms(left).sum()

    def add_step(self) -> None:
        """Takes a step that was just made: θₜ₊₁ in place, and in `.grad` what was applied."""
        watching = self.is_watching
        self.step += 1
        self._rate = _rate(self.optimizer)  # a schedule may change it before anybody asks
        self._time += self._rate
        if not watching:
            return
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moved = [parameter for parameter in held if parameter.grad is not None]
        self._missing = {self._name(parameter) for parameter in held if parameter.grad is None}
        if not moved:
            return
        gradients = [parameter.grad.detach().to_dense() for parameter in moved]
        parameters = _flat([parameter.detach() for parameter in moved])
        self._watch(_flat(gradients), parameters, norms(gradients))
        self._moved: list[Parameter] = moved

    def _watch(self, gradient: Tensor, parameters: Tensor, gradient_norms: Tensor) -> None:
        if self._gradients and len(self._gradients[-1]) != len(gradient):
            self._begin_window()  # another set of parameters has a gradient now
        nothing = gradient.new_zeros(())
        one, two, moved, before, size, promise, turn = (nothing,) * 7
        if self._gradients:
            last = self._gradients[-1]
            one = gradient @ last
            step = parameters - self._parameters[-1]
            moved, size, promise = step @ step, self._parameters[-1] @ self._parameters[-1], gradient @ step
            if len(self._gradients) > 1:
                two = gradient @ self._gradients[-2]
                last_step = self._parameters[-1] - self._parameters[-2]
                before, turn = last_step @ last_step, (gradient - last) @ last_step
        products = torch.stack([gradient @ gradient, one, two, moved, size, promise, before, turn])
        self._watched.append(Watched(products, gradient_norms))
        self._gradients = [*self._gradients[-1:], gradient]
        self._parameters = [*self._parameters[-1:], parameters]

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter), "?")

    def evidence(
        self,
        frozen: Mapping[str, int] | None = None,
        sharpness: float | None = None,
    ) -> Evidence:
        """Returns what was seen, and begins a new window.

        Args:
            frozen: Parameters of the module that no optimizer can move, and their sizes.
            sharpness: λ, where somebody has measured it.
        """
        losses = [float(loss) for loss in torch.stack(self._losses).double().cpu()] if self._losses else []
        rows = torch.stack([each.products for each in self._watched]).double().tolist() if self._watched else []
        non_finite = sum(not math.isfinite(value) for value in losses)
        # A square that overflows is no infinite gradient.
        non_finite += sum(not math.isfinite(float(row.gradient_norms.double().sum())) for row in self._watched)  # type: ignore[union-attr]
        method, momentum = _method(self.optimizer)
        seen: dict[str, Any] = {
            "step": self.step,
            "planned_steps": self._last_step,
            "learning_rate": self._rate,
            "method": method,
            "momentum": momentum,
            "full_batch": self._full_batch,
            "num_non_finite": non_finite,
            "sharpness": self._line.sharpness if self._line else sharpness,
            "line": self._outlook(self._rate),
            "first_excess": self._first_excess,
            "best_learning_rate": self._best_learning_rate,
            "frozen": tuple(frozen or ()),
            "without_gradient": tuple(sorted(self._missing)),
            "leftover_gradient": self._leftover is not None and bool(self._leftover > 0),
            **self._of_the_parameters(frozen or {}),
        }
        if not non_finite:
            seen |= self._of_the_losses(losses)
            seen |= self._of_the_gradients(rows, losses, seen)
        self._losses.clear()
        self._leftover = None
        self._begin_window()
        evidence = Evidence(**seen)
        self._gradient_excess = _gradient_excess(evidence) or self._gradient_excess
        return replace(evidence, gradient_excess=self._gradient_excess)

    def _of_the_parameters(self, frozen: Mapping[str, int]) -> dict[str, Any]:
        """Which have a gradient that is not zero."""
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        count = sum(parameter.numel() for parameter in held) + sum(frozen.values())
        if not self._watched:
            return {"share_moving": 0.0}
        most = torch.stack([each.gradient_norms for each in self._watched]).amax(dim=0).tolist()  # type: ignore[misc]
        zero = [self._name(parameter) for parameter, norm in zip(self._moved, most, strict=True) if norm == 0]
        moving = sum(parameter.numel() for parameter, norm in zip(self._moved, most, strict=True) if norm != 0)
        return {"zero_gradient": tuple(zero), "share_moving": moving / max(count, 1)}

    def _of_the_losses(self, losses: Sequence[float]) -> dict[str, Any]:
        if not losses:
            return {}
        if self._first_loss is None:
            self._first_loss = losses[0]
        recent = _block(losses)
        self._blocks.append(recent)
        if len(self._blocks) > MOST_BLOCKS:
            self._blocks = [_merged(*pair) for pair in zip(self._blocks[::2], self._blocks[1::2], strict=True)]
        best = min(self._blocks, key=lambda block: block.mean)
        least = min(best.mean, min(losses)) if self._full_batch else best.mean
        half = len(losses) // 2
        rise = _certainty([_block(losses[:half])], [_block(losses[half:])]) if half else 0.0
        late = self._blocks[len(self._blocks) // 2 :]
        middle = len(late) // 2
        growth = losses[-1] / losses[-self._window] if len(losses) >= self._window and losses[-self._window] else None
        return {
            "first_loss": self._first_loss,
            "loss": losses[-1] if self._full_batch else recent.mean,
            "best_loss": least,
            "loss_growth": _certainty([best], [recent]),
            "loss_rise": rise,
            "loss_trend": _certainty(late[:middle], late[middle:]) if middle else rise,
            "window_growth": growth,
        }

    def _of_the_gradients(
        self, rows: Sequence[Sequence[float]], losses: Sequence[float], seen: Mapping[str, Any]
    ) -> dict[str, Any]:
        if not rows:
            return {}
        squares, ones, twos, moved, sizes, promises, _, _ = zip(*rows, strict=True)
        norm = math.sqrt(fmean(squares))
        self._history.append(Glance(self.step, norm, self._time))
        first_cosine = _cosine(ones[1:], squares)
        cosine_after_two = _cosine(twos[2:], squares, lag=2)
        noise = 0.0
        if not self._full_batch and first_cosine is not None:
            # A step that overshoots turns the gradient round, and the next one back: noise does not come back.
            bounces = first_cosine < -0.8 and (cosine_after_two or 0.0) > 0.8
            noise = 0.0 if bounces else 1 - max(0.0, first_cosine)
        # Shorter steps and gradients drown in the rounding of float32.
        heard = [row for row in rows if row[0] > ROUNDING**2 * self._history[0].norm ** 2]
        curvatures = [turn / before for *_, size, _, before, turn in heard if before > ROUNDING**2 * size]
        curvature = median(curvatures) if curvatures and noise < 0.1 else None
        if curvature and curvature > (self._largest_curvature or 0.0):
            self._largest_curvature = curvature
        decay = self._decay()
        per_step = None if decay is None else math.exp(max(-50.0, min(50.0, -decay * self._rate)))
        ratios = [later / earlier for earlier, later in pairwise(squares) if earlier > 0 and later > 0]
        figures = {
            "gradient_norm": norm,
            "first_gradient_norm": self._history[0].norm,
            "gradient_ratio": math.exp(fmean(map(math.log, ratios)) / 2) if ratios else None,
            "gradient_decay": per_step,
            "gradient_cosine": first_cosine,
            "noise_share": noise,
            "curvature": curvature,
            "largest_curvature": self._largest_curvature,
            "update_ratio": math.sqrt(fmean(moved[1:]) / fmean(sizes[1:])) if len(rows) > 1 and any(sizes) else None,
        }
        promise, bend = -fmean(promises[1:] or [0.0]), (curvature or 0.0) * fmean(moved[1:] or [0.0]) / 2
        if len(rows) > 1:
            figures["left_to_gain"] = self._left_to_gain(
                promise, promise - bend, fmean(squares), decay, noise, seen.get("loss_trend", 0.0)
            )
        if self._full_batch and len(losses) >= len(rows) > 2 and promise > 0:
            # The step after the last loss has no loss after it.
            change = losses[-1] - losses[-len(rows) + 1]
            if abs(change) > 1e-4 * abs(losses[-1]):
                figures["descent_ratio"] = change / sum(promises[1:-1])
        return figures

    def _decay(self) -> float | None:
        """How quickly ln ‖g‖ falls per unit of time, where a step takes η: the same whatever the schedule does."""
        now = self._history[-1]
        # A long look back, because what is slow shows only there.
        earlier = [each for each in self._history[:-1] if each.step <= 0.75 * now.step] or self._history[:-1]
        if len(self._history) > 2 * MOST_BLOCKS:
            del self._history[1:-MOST_BLOCKS:2]
        if not earlier or earlier[-1].norm <= 0 or now.norm <= 0 or now.time <= earlier[-1].time:
            return None
        return math.log(earlier[-1].norm / now.norm) / (now.time - earlier[-1].time)

    def _left_to_gain(
        self, promise: float, gain: float, square: float, decay: float | None, noise: float, trend: float
    ) -> float:
        """∫ of what is gained per unit of time, which falls as the gradient's square does: gain / (2 · decay).

        But never more than ten times the time so far would bring at an undiminished pace. Where noise prevails, the
        excess at which a rate η holds the weights, ησ²/4 for isotropic noise of variance σ² (per step, all elements).
        """
        if noise > 0.5:
            floor = abs(promise) / max(square, FEW) * noise * square / 4
            return floor if trend > -3.0 else math.inf
        if self._rate <= 0 or self._time <= 0:
            return math.inf
        return abs(gain) / self._rate * (1 - noise) / max(2 * (decay or 0.0), 0.1 / self._time)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).float()


def _cosine(products: Sequence[float], squares: Sequence[float], lag: int = 1) -> float | None:
    """Mean cosine of gradients so many steps apart; None where there are none."""
    pairs = zip(products, squares, squares[lag:], strict=False)
    cosines = [product / math.sqrt(one * other) for product, one, other in pairs if one > 0 and other > 0]
    return max(-1.0, min(1.0, fmean(cosines))) if cosines else None


def _block(losses: Sequence[float]) -> Block:
    """In logarithms, so that a factor counts the same up and down; a loss that can be negative is taken as it is."""
    levels = [math.log(loss) for loss in losses] if min(losses) > 0 else losses
    return Block(len(losses), fmean(losses), fmean(levels), variance(levels) if len(levels) > 1 else 0.0)


def _merged(one: Block, other: Block) -> Block:
    num = one.num + other.num
    mean, level = ((one.num * a + other.num * b) / num for a, b in ((one.mean, other.mean), (one.level, other.level)))
    inside = one.num * one.spread + other.num * other.spread
    between = one.num * (one.level - level) ** 2 + other.num * (other.level - level) ** 2
    return Block(num, mean, level, (inside + between) / num)


def _certainty(before: Sequence[Block], after: Sequence[Block]) -> float:
    """Welch's t: standard errors by which the later losses lie above the earlier."""

    def total(blocks: Sequence[Block]) -> Block:
        whole = blocks[0]
        for block in blocks[1:]:
            whole = _merged(whole, block)
        return whole

    one, other = total(before), total(after)
    error = math.sqrt(one.spread / one.num + other.spread / other.num)
    difference = other.level - one.level
    return difference / max(error, FEW + 1e-7 * abs(one.level)) if difference else 0.0


def _gradient_excess(seen: Evidence) -> float | None:
    """By how much the gradient is longer than the loss's slope; None where that cannot be told.

    Along a step Δθ a parabola's loss changes by ⟨∇L, Δθ⟩ + ½c‖Δθ‖². Of a gradient g = k∇L both are seen k times as
    large, so that the descent ratio is (1 − s)/k instead of 1 − s, where s = ½c‖Δθ‖² / −⟨g, Δθ⟩ is of the gradients
    alone. Or, for a line: by how much the curvature along the steps exceeds the exact λ.
    """
    if not seen.full_batch or seen.method != "gradient_descent" or not seen.curvature:
        return None
    if seen.line is not None and seen.sharpness and seen.curvature > 1.05 * seen.sharpness:
        return seen.curvature / seen.sharpness
    overshoot = seen.learning_rate * seen.curvature / 2
    if seen.descent_ratio is None or overshoot > 0.5 or seen.descent_ratio < 0.05:
        return None
    return (1 - overshoot) / seen.descent_ratio


def _rate(optimizer: Optimizer) -> float:
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _method(optimizer: Optimizer) -> tuple[Method, float]:
    """What the theory knows of the optimizer."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, SGD) and not group.get("dampening") and not group.get("maximize"):
        momentum = float(group["momentum"])
        return ("nesterov" if group["nesterov"] else "momentum") if momentum else "gradient_descent", momentum
    return ("adam" if isinstance(optimizer, Adam | NAdam | RAdam | RMSprop) else "other"), 0.0
