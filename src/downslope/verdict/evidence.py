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
from dataclasses import replace
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
from downslope.gradients.vectors import num_elements, real
from downslope.verdict.judgement import Evidence, Method

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


class Row(NamedTuple):
    """Of one step of the window: what the products of its vectors say; 0 where a predecessor is missing."""

    square: float  # ‖gₜ‖²
    one: float  # ⟨gₜ, gₜ₋₁⟩
    two: float  # ⟨gₜ, gₜ₋₂⟩
    moved: float  # ‖Δθₜ‖²
    size: float  # ‖θₜ‖²
    promise: float  # ⟨gₜ, Δθₜ⟩
    before: float  # ‖Δθₜ₋₁‖²
    turn: float  # ⟨gₜ − gₜ₋₁, Δθₜ₋₁⟩

    @classmethod
    def of(cls, products: Sequence[Sequence[float]]) -> "Row":
        """Reads the products of gₜ, gₜ₋₁, gₜ₋₂, Δθₜ, Δθₜ₋₁ and θₜ, each with each."""
        g, last, _, step, last_step, start = products
        return cls(g[0], g[1], g[2], step[3], start[5], g[3], last_step[4], g[4] - last[4])


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
        self._next_due = step
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

    def _begin_window(self) -> None:
        self._moved: list[Parameter] = []
        self._products: list[Tensor] = []
        self._missing: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know of its beginning and of its window: plain data and tensors."""
        return {
            "blocks": [list(block) for block in self._blocks],
            "history": [list(glance) for glance in self._history],
            "first_loss": self._first_loss,
            "first_excess": self._first_excess,
            "best_learning_rate": self._best_learning_rate,
            "largest_curvature": self._largest_curvature,
            "time": self._time,
            "gradient_excess": self._gradient_excess,
            "window": {
                "losses": self._losses,
                "products": self._products,
                "last": list(self._last) if self._products else [],
                "most": self._most if self._products else None,
                "moved": [
                    index for index, each in enumerate(self._held) if any(each is moved for moved in self._moved)
                ],
                "missing": list(self._missing),
                "leftover": self._leftover,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._blocks = [Block(*block) for block in state["blocks"]]
        self._history = [Glance(*glance) for glance in state["history"]]
        self._first_loss, self._first_excess = state["first_loss"], state["first_excess"]
        self._best_learning_rate = state["best_learning_rate"]
        self._largest_curvature, self._time = state["largest_curvature"], state["time"]
        self._gradient_excess = state["gradient_excess"]
        window, held = state["window"], self._held
        device = held[0].device
        self._losses = [loss.to(device) for loss in window["losses"]]
        self._products = [products.to(device) for products in window["products"]]
        if self._products:
            gradient, before, step, parameters = (tensor.to(device) for tensor in window["last"])
            self._last, self._most = (gradient, before, step, parameters), window["most"].to(device)
        self._moved = [held[index] for index in window["moved"]]
        self._missing, self._leftover = tuple(window["missing"]), window["leftover"]

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
        weights = _flat(parameters)
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
        weights = _flat(self._line_parameters)
        return outlook(self._line, weights, learning_rate, self._target, self._line_names)

    @property
    def is_due(self) -> bool:
        """Tells whether the step that was taken last ends a window."""
        return self.step % self._every_n_steps == 0 or self.step in self._others

    @property
    def is_watching(self) -> bool:
        """Tells whether the next step is one of a window."""
        if self.step >= self._next_due:
            nearest = (self.step // self._every_n_steps + 1) * self._every_n_steps
            self._next_due = min([nearest, *(step for step in self._others if step > self.step)])
        return self._next_due - self.step <= self._window

    def add_loss(self, loss: Tensor) -> None:
        """Takes the loss of a batch, before its step."""
        self._losses.append(loss.detach())

    def add_leftover(self) -> None:
        """Takes the gradients that `backward` finds when it begins a new step: they should be gone, or zero."""
        left = [parameter.grad for parameter in self._held if parameter.grad is not None]
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
        moved = [parameter for parameter in self._held if parameter.grad is not None]
        if [*map(id, moved)] != [*map(id, self._moved)]:
            self._begin_window()  # another set of parameters has a gradient now
            self._moved = moved
        self._missing = tuple(self._name(parameter) for parameter in self._held if parameter.grad is None)
        if moved:
            self._watch(_flat([parameter.grad for parameter in moved if parameter.grad is not None]), _flat(moved))

    @property
    def _held(self) -> list[Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _watch(self, gradient: Tensor, parameters: Tensor) -> None:
        """Takes all products of gₜ, gₜ₋₁, gₜ₋₂, Δθₜ, Δθₜ₋₁ and θₜ at once; what came before the window is zero."""
        if not self._products:
            nothing = torch.zeros_like(gradient)
            self._last = (nothing, nothing, nothing, parameters)
            self._most = nothing
        last, before_last, last_step, start = self._last
        step = parameters - start
        vectors = torch.stack([gradient, last, before_last, step, last_step, start])
        self._products.append(vectors @ vectors.T)
        self._most = torch.maximum(self._most, gradient.abs())
        self._last = (gradient, last, step, parameters)

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
        losses = torch.stack(self._losses).cpu().double().tolist() if self._losses else []
        rows = [Row.of(each) for each in torch.stack(self._products).cpu().double().tolist()] if self._products else []
        largest = self._largest_by_parameter()
        non_finite = sum(not math.isfinite(value) for value in [*losses, *largest])
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
            "without_gradient": self._missing,
            "leftover_gradient": self._leftover is not None and bool(self._leftover > 0),
            **self._of_the_parameters(largest, frozen or {}),
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

    def _largest_by_parameter(self) -> list[float]:
        """The largest element that each parameter's gradient had in the window."""
        if not self._products:
            return []
        parts = self._most.split([num_elements(parameter) for parameter in self._moved])
        return torch.stack([part.max() if part.numel() else part.new_zeros(()) for part in parts]).tolist()

    def _of_the_parameters(self, largest: Sequence[float], frozen: Mapping[str, int]) -> dict[str, Any]:
        """Which have a gradient that is not zero."""
        count = sum(parameter.numel() for parameter in self._held) + sum(frozen.values())
        moving = [parameter for parameter, most in zip(self._moved, largest, strict=True) if most != 0]
        still = [parameter for parameter, most in zip(self._moved, largest, strict=True) if most == 0]
        return {
            "zero_gradient": tuple(self._name(parameter) for parameter in still if parameter.numel()),
            "share_moving": sum(parameter.numel() for parameter in moving) / max(count, 1),
        }

    def _of_the_losses(self, losses: Sequence[float]) -> dict[str, Any]:
        if not losses:
            return {}
        if self._first_loss is None:
            self._first_loss = losses[0]
        recent = _block(losses)
        self._blocks.append(recent)
        if len(self._blocks) > MOST_BLOCKS:
            *pairs, newest = self._blocks
            self._blocks = [*(_merged(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)), newest]
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
        self, rows: Sequence[Row], losses: Sequence[float], seen: Mapping[str, Any]
    ) -> dict[str, Any]:
        if not rows:
            return {}
        if not all(math.isfinite(value) for row in rows for value in row):
            return {"gradient_norm": math.inf}  # each element is finite, but their squares no longer are
        norm = math.sqrt(fmean(row.square for row in rows))
        self._history.append(Glance(self.step, norm, self._time))
        first_cosine, cosine_after_two = _cosine(rows, 1), _cosine(rows, 2)
        noise = 0.0
        if not self._full_batch and first_cosine is not None:
            # A step that overshoots turns the gradient round, and the next one back: noise does not come back.
            bounces = first_cosine < -0.8 and (cosine_after_two or 0.0) > 0.8
            noise = 0.0 if bounces else 1 - max(0.0, first_cosine)
        curvature = self._curvature(rows) if noise < 0.1 else None
        if curvature and curvature > (self._largest_curvature or 0.0):
            self._largest_curvature = curvature
        decay = self._decay()
        ratios = [later.square / earlier.square for earlier, later in pairwise(rows) if earlier.square and later.square]
        moved, size = fmean(row.moved for row in rows[1:] or rows), fmean(row.size for row in rows)
        figures = {
            "gradient_norm": norm,
            "first_gradient_norm": self._history[0].norm,
            "gradient_ratio": math.exp(fmean(map(math.log, ratios)) / 2) if ratios else None,
            "gradient_decay": None if decay is None else math.exp(max(-50.0, min(50.0, -decay * self._rate))),
            "gradient_cosine": first_cosine,
            "noise_share": noise,
            "curvature": curvature,
            "largest_curvature": self._largest_curvature,
            "update_ratio": math.sqrt(moved / size) if size and len(rows) > 1 else None,
        }
        if len(rows) > 1:
            promise = -fmean(row.promise for row in rows[1:])
            gain = promise - (curvature or 0.0) * moved / 2
            trend = seen.get("loss_trend", 0.0)
            figures["left_to_gain"] = self._left_to_gain(promise, gain, norm**2, decay, noise, trend)
        if self._full_batch and len(losses) >= len(rows) > 2:
            figures["descent_ratio"] = _descent_ratio(rows, losses)
        return figures

    def _curvature(self, rows: Sequence[Row]) -> float | None:
        """The median along the steps; shorter steps and gradients would drown in the rounding of float32."""
        heard = [row for row in rows if row.square > ROUNDING**2 * self._history[0].norm ** 2]
        curvatures = [row.turn / row.before for row in heard if row.before > ROUNDING**2 * row.size]
        return median(curvatures) if curvatures else None

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


@torch.no_grad()
def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as one vector of its own, in float32."""
    parts = [real(tensor.to_dense()).reshape(-1) for tensor in tensors]
    return torch.cat(parts).float()


def _cosine(rows: Sequence[Row], lag: int) -> float | None:
    """Mean cosine of gradients so many steps apart; None where there are none."""
    products = [row.one if lag == 1 else row.two for row in rows[lag:]]
    sizes = [math.sqrt(one.square) * math.sqrt(other.square) for one, other in zip(rows, rows[lag:], strict=False)]
    cosines = [product / size for product, size in zip(products, sizes, strict=True) if size > 0]
    return max(-1.0, min(1.0, fmean(cosines))) if cosines else None


def _descent_ratio(rows: Sequence[Row], losses: Sequence[float]) -> float | None:
    """What the window's steps changed the loss by, over what the gradient promised; the last one's is not known."""
    change = losses[-1] - losses[-len(rows) + 1]
    promise = sum(row.promise for row in rows[1:-1])
    return change / promise if promise < 0 and abs(change) > 1e-4 * abs(losses[-1]) else None


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
