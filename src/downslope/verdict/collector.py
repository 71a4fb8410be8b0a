"""Evidence, collected from the steps of any loop: torch alone.

collector = EvidenceCollector(optimizer, names)
for batch in batches:
    loss = …; optimizer.zero_grad(); loss.backward(); optimizer.step()
    collector.add_loss(loss)
    collector.add_step()
    if collector.is_due:
        print(judge(collector.evidence()).sentence)
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from downslope.gradients.least_squares import LeastSquares
from downslope.gradients.norms import norms
from downslope.gradients.outlook import best_learning_rate, outlook
from downslope.gradients.vectors import flat
from downslope.verdict import window
from downslope.verdict.evidence import Evidence
from downslope.verdict.losses import EARLY, FEW, Losses
from downslope.verdict.method import decay_of, decays_of, first_length, is_maximising, method_of, rate_of
from downslope.verdict.traces import LossTraces, traces_of_loss
from downslope.verdict.window import Row, Window

FIRST_JUDGEMENTS = (8, 16, 32)  # at 10 × the limit float32 overflows after some 30 steps
MOST_GLANCES = 512
ZERO = 1e-4  # of the peak: a schedule that has come to its end


class Glance(NamedTuple):
    """‖g‖ at a judgement, and the time until then: Σ η over the steps."""

    step: int
    norm: float
    time: float


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
        self.step = self._judged_at = step
        self._names = names
        self._every_n_steps, self._window_size = every_n_steps, window
        self._full_batch = full_batch
        self._last_step = last_step
        self._others = (*FIRST_JUDGEMENTS, last_step or 0)
        self._next = 0  # step after which it is judged
        self._line: LeastSquares | None = None
        self._recent: list[Tensor] = []
        self._losses, self._window = Losses(full_batch), Window()
        self._glances: list[Glance] = []
        self._rate = rate_of(optimizer)
        self._leftover: Tensor | float | None = None
        self._least_found: Tensor | float | None = None  # since the last step
        self._asked: Tensor | None = None  # sum of the losses that were differentiated since the last step
        self._differentiated: list[Tensor] = []  # … at each step of the window
        self._traces = LossTraces()  # of the first loss since the last judgement
        self._lasting: dict[str, Any] = {}  # what one judgement finds and later ones need, by its name in `Evidence`
        self._time = 0.0
        self._reached: set[int] = (
            set()
        )  # by a gradient, at any step that was watched: an expert, a head need not always

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to know of its beginning and of its window: plain data and tensors."""
        return {
            "time": self._time,
            "lasting": self._lasting,
            "losses": self._losses.state_dict(),
            "glances": [list(glance) for glance in self._glances],
            "recent": self._recent,
            "window": self._window.state_dict(self._held),
            "leftover": [self._leftover, self._least_found],
            "differentiated": self._differentiated,
            "traces": self._traces.state(),
            "judged_at": self._judged_at,
            "reached": [index for index, each in enumerate(self._held) if id(each) in self._reached],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes there."""
        self._time, self._lasting = state["time"], dict(state["lasting"])
        self._losses.load_state_dict(state["losses"])
        self._glances = [Glance(*glance) for glance in state["glances"]]
        self._recent = [loss.to(self._held[0].device) for loss in state["recent"]]
        self._window.load_state_dict(state["window"], self._held)
        self._leftover, self._least_found = state["leftover"]
        self._differentiated = [loss.to(self._held[0].device) for loss in state["differentiated"]]
        self._traces, self._judged_at = LossTraces.from_state(state["traces"]), state["judged_at"]
        self._reached = {id(self._held[index]) for index in state.get("reached", ())}

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
        weights = flat(parameters)
        if len(weights) != len(line.parameters) or not line.is_complete:
            return
        self._line, self._line_parameters, self._line_names = line, parameters, names
        first = self._lasting.setdefault("first_excess", outlook(line, weights, 0.0, 0.0).excess)
        self._target = tolerance * first
        if "best_learning_rate" not in self._lasting:
            self._lasting["best_learning_rate"] = best_learning_rate(line, weights, self._target)

    @property
    def is_due(self) -> bool:
        """Tells whether the step that was taken last ends a window."""
        return self.step % self._every_n_steps == 0 or self.step in self._others

    @property
    def is_watching(self) -> bool:
        """Tells whether the next step is one of a window."""
        if self._next <= self.step:
            multiple = self.step + self._every_n_steps - self.step % self._every_n_steps
            self._next = min([multiple, *(step for step in self._others if step > self.step)])
        return self._next - self.step <= self._window_size

    def add_loss(self, loss: Tensor, num_batches: int = 1) -> None:
        """Takes the loss of a step's batch, or the mean of those of several."""
        self._recent.append(loss.detach() if loss.requires_grad else loss)
        if num_batches > 1 and self._differentiated and not self._traces.is_whole:
            self._differentiated.pop()  # each may have been divided beforehand, as it was logged

    def add_backward(self, loss: Tensor | None = None) -> None:
        """Takes what a `backward` is about to differentiate, and what it finds in `.grad`: one of a step's finds none.

        Not every one: micro-batches add up, and another loss, a discriminator's, finds the gradient of this one.

        Args:
            loss: None where it may be another optimizer's, or was asked for before in this step.
        """
        left = [parameter.grad for parameter in self._held if parameter.grad is not None]
        if not left or isinstance(self._least_found, float):
            self._least_found = 0.0
        else:
            found = norms(left).sum()
            self._least_found = found if self._least_found is None else torch.minimum(self._least_found, found)
        if loss is None:
            self._asked = None
            return
        if not self._differentiated and self._asked is None:
            self._traces = traces_of_loss(loss)
        loss = loss.detach().mean() if loss.ndim else loss.detach()  # on small models each call counts
        self._asked = loss if self._asked is None else self._asked + loss

    def add_step(self) -> None:
        """Takes a step that was just made: θₜ₊₁ in place, and in `.grad` what was applied."""
        if self.is_watching:
            self._window.add(self._held, decays_of(self.optimizer))
            self._reached.update(map(id, self._window.moved))
            self._differentiated += [] if self._asked is None else [self._asked]
        self._asked = None
        self.step += 1
        self._rate = rate_of(self.optimizer)  # a schedule may change it before anybody asks
        self._time += self._rate
        peak = self._lasting["peak_learning_rate"] = max(self._rate, self._lasting.get("peak_learning_rate", 0.0))
        self._lasting["steps_at_zero"] = self._lasting.get("steps_at_zero", 0) + (self._rate < ZERO * peak)
        self._leftover, self._least_found = self._least_found, None

    def knows(self, name: str) -> bool:
        """Tells whether a trace of this name has been taken."""
        return name in self._lasting

    def add_traces(self, **traces: Any) -> None:
        """Takes what was seen beside steps and losses, by its name in `Evidence`."""
        self._lasting |= traces

    def add_critical(self, step: int, value: float) -> None:
        """Takes the critical learning rate of a step: `downslope.gradients.critical_learning_rate`.

        The first steps of some methods are shorter or longer than they come to be, and η_c is taken for as much less or
        more (`downslope.verdict.method.first_length`).

        Args:
            step: t, steps taken before it.
            value: η_c, along the step that was really made, above 0.
        """
        value *= first_length(self.optimizer, step)
        known = self._lasting
        known["critical_learning_rate"] = value
        known.setdefault("first_critical_learning_rate", value)
        known["least_critical_learning_rate"] = min(value, known.get("least_critical_learning_rate", math.inf))
        if step <= EARLY:
            known["early_critical_ratio"] = max(self._rate / value, known.get("early_critical_ratio", 0.0))

    @property
    def _held(self) -> list[Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def evidence(
        self,
        frozen: Iterable[str] = (),
        sharpness: float | None = None,
        forgotten: Iterable[str] = (),
        has_ended: bool = False,
    ) -> Evidence:
        """Returns what was seen, and begins a new window.

        Args:
            frozen: Parameters of the module that are not to move.
            sharpness: λ, where somebody has measured it.
            forgotten: Parameters that get a gradient, though no optimizer holds them.
            has_ended: Whether training ends here: it need not, where it was planned.
        """
        losses = torch.stack(self._recent).cpu().double().tolist() if self._recent else []
        rows, largest = self._window.rows(), self._window.largest()
        num_non_finite = sum(not math.isfinite(value) for value in [*losses, *largest])
        method, momentum = method_of(self.optimizer)
        seen: dict[str, Any] = self._of_the_parameters(largest)
        if not num_non_finite:
            seen |= self._losses.add(losses, self._window_size)
            seen |= self._of_the_gradients(rows, losses, seen.get("loss_trend", 0.0))
        seen |= self._of_the_loss(losses)
        if self._line is not None:
            now = (flat(self._line_parameters), self._rate, self._target, self._line_names, self._time)
            seen["line"], sharpness = outlook(self._line, *now), self._line.sharpness
        self._recent.clear()
        self._window.clear()
        self._differentiated.clear()
        self._traces = LossTraces()
        self._judged_at = self.step
        self._leftover = None
        return Evidence(
            step=self.step,
            planned_steps=self._last_step,
            learning_rate=self._rate,
            method=method,
            momentum=momentum,
            full_batch=self._full_batch,
            sharpness=sharpness,
            frozen=tuple(frozen),
            forgotten=tuple(forgotten),
            has_ended=has_ended or self.step == self._last_step,
            num_non_finite=num_non_finite,
            **(seen | self._lasting),
        )

    def _of_the_parameters(self, largest: Sequence[float]) -> dict[str, Any]:
        """Which have a gradient, and one that is not zero."""
        if not self._window.num_steps:
            return {}
        moved = self._window.moved
        still = [parameter for parameter, most in zip(moved, largest, strict=True) if most == 0]
        without = [each for each in self._held if each.requires_grad and id(each) not in self._reached]
        num_still, num_moved = (sum(map(torch.numel, each)) for each in (still, moved))
        share_moving = (num_moved - num_still) / max(num_moved + sum(map(torch.numel, without)), 1)
        self._lasting.setdefault("first_share_moving", share_moving)
        return {
            "without_gradient": self._names_of(without),
            "zero_gradient": self._names_of([each for each in still if each.numel()]),
            "leftover_gradient": self._leftover is not None and bool(self._leftover > 0),
            "share_moving": share_moving,
        }

    def _names_of(self, parameters: Sequence[Parameter]) -> tuple[str, ...]:
        return tuple(self._names.get(id(parameter), "?") for parameter in parameters)

    def _of_the_gradients(self, rows: Sequence[Row], losses: Sequence[float], trend: float) -> dict[str, Any]:
        if not rows:
            return {}
        if not all(math.isfinite(value) for row in rows for value in row):
            return {"gradient_norm": math.inf}  # each element is finite, but their squares no longer are
        norm = math.sqrt(fmean(row.square for row in rows))
        self._glances.append(Glance(self.step, norm, self._time))
        noise = 0.0 if self._full_batch else window.noise_share(rows)
        curvature = window.curvature(rows, self._glances[0].norm) if noise < 0.1 else None
        if curvature and curvature > self._lasting.get("largest_curvature", 0.0):
            self._lasting["largest_curvature"] = curvature
        if excess := self._exact_excess() if self._line is not None else self._excess(rows, losses, curvature):
            self._lasting["gradient_excess"] = excess
        decay = self._decay()
        norms_seen = [math.sqrt(row.square) for row in rows]
        is_same = not self._full_batch and len(rows) > 2 and max(norms_seen) - min(norms_seen) < 1e-4 * norm
        self._lasting["clipped_norm"] = norm if is_same and self._lasting.get("clipped_norm", norm) else 0.0
        if "decay_share" not in self._lasting:
            self._lasting["decay_share"] = window.decay_share(rows, *decay_of(self.optimizer))
        return {
            "share_changed": self._window.share_changed(),
            "gradient_norm": norm,
            "first_gradient_norm": self._glances[0].norm,
            "gradient_ratio": window.gradient_ratio(rows),
            "gradient_decay": None if decay is None else math.exp(max(-50.0, min(50.0, -decay * self._rate))),
            "gradient_cosine": window.cosine(rows, 1),
            "noise_share": noise,
            "curvature": curvature,
            "update_ratio": window.update_ratio(rows),
            "left_to_gain": self._left_to_gain(rows, curvature, decay, noise, trend),
        }

    def _of_the_loss(self, losses: Sequence[float]) -> dict[str, Any]:
        """What was differentiated: of how many times the loss, of what, and how much a constant output has of it."""
        if self._traces.level:
            known, level = self._lasting.get("constant_loss"), self._traces.level()
            self._lasting["constant_loss"] = level if known is None else 0.8 * known + 0.2 * level
        missing = max(0, self.step - self._judged_at - len(losses))  # that of a step in which the run ended
        num = len(self._differentiated) - missing
        if 0 < num <= len(losses) and "gradient_excess" not in self._lasting:
            asked, logged = float(torch.stack(self._differentiated[:num]).sum()), sum(losses[-num:])
            if asked > 1.8 * logged > 0:
                self._lasting["gradient_excess"] = asked / logged
        return {
            "squashed": self._traces.squashed,
            "broadcast": self._traces.broadcast,
            "is_maximised": self._traces.is_maximised or is_maximising(self.optimizer),
        }

    def _exact_excess(self) -> float | None:
        """⟨g, ∇L⟩ / ‖∇L‖², with the slope ∇L = H(θ − θ*) of a line where the last step began."""
        moved = [*map(id, self._window.moved)]
        if not (self._full_batch and self._window.is_whole) or moved != [*map(id, self._line_parameters)]:
            return None
        assert self._line
        gradient, start = (each.cpu().double() for each in self._window.last_step)
        along = self._line.eigenvectors.T @ (start - self._line.parameters)
        slope = self._line.eigenvectors @ (self._line.eigenvalues * along)
        heard = window.ROUNDING * 100 * self._glances[0].norm
        return float(gradient @ slope / (slope @ slope)) if float(slope.norm()) > heard else None

    def _excess(self, rows: Sequence[Row], losses: Sequence[float], curvature: float | None) -> float | None:
        """By how much the gradient is longer than the loss's slope; None where that cannot be told.

        Along a step Δθ a parabola's loss changes by ⟨∇L, Δθ⟩ + ½c‖Δθ‖². Of a gradient g = k∇L both are seen k times as
        large, so that the descent ratio is (1 − s)/k instead of 1 − s, where s = ½c‖Δθ‖² / −⟨g, Δθ⟩ is of the gradients
        alone.
        """
        is_plain = method_of(self.optimizer)[0] == "gradient_descent" and not any(decays_of(self.optimizer))
        descent = window.descent_ratio(rows, losses)
        overshoot = self._rate * (curvature or 0.0) / 2
        if not self._full_batch or not is_plain or not curvature or descent is None:
            return None
        return (1 - overshoot) / descent if overshoot <= 0.5 and descent >= 0.05 else None

    def _decay(self) -> float | None:
        """How quickly ln ‖g‖ falls per unit of time, where a step takes η: the same whatever the schedule does."""
        now = self._glances[-1]
        # A long look back, because what is slow shows only there.
        earlier = [each for each in self._glances[:-1] if each.step <= 0.75 * now.step] or self._glances[:-1]
        if len(self._glances) > MOST_GLANCES:
            del self._glances[1 : -MOST_GLANCES // 2 : 2]
        if not earlier or earlier[-1].norm <= 0 or now.norm <= 0 or now.time <= earlier[-1].time:
            return None
        return math.log(earlier[-1].norm / now.norm) / (now.time - earlier[-1].time)

    def _left_to_gain(
        self, rows: Sequence[Row], curvature: float | None, decay: float | None, noise: float, trend: float
    ) -> float | None:
        """∫ of what is gained per unit of time, which falls as the gradient's square does: gain / (2 · decay).

        But never more than ten times the time so far would bring at an undiminished pace. Where noise prevails, the
        excess at which a rate η holds the weights, ησ²/4 for isotropic noise of variance σ² (per step, all elements).
        """
        if len(rows) < 2:
            return None
        promise = -fmean(row.promise for row in rows[1:])
        if noise > 0.5:
            square = fmean(row.square for row in rows)
            floor = abs(promise) / max(square, FEW) * noise * square / 4
            return floor if trend > -3.0 else math.inf
        if self._rate <= 0 or self._time <= 0:
            return math.inf
        gain = promise - (curvature or 0.0) * fmean(row.moved for row in rows[1:]) / 2
        return abs(gain) / self._rate * (1 - noise) / max(2 * (decay or 0.0), 0.1 / self._time)
