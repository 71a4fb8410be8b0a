"""Is the gradient right? Autograd against central differences and forward mode, for any LightningModule."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from downslope.gradients.loss_function import Loss, LossFunction
from downslope.gradients.slope import central_difference, measure_slope

NUM_PLACES = 4
MOVE = 1e-3  # relative; far enough from a kink, near enough to be the same model
ROUNDING = 100  # a loss that adds up many terms errs by more than one ε; a hundred covers a million random ones


@dataclass(frozen=True)
class Disagreement:
    """One parameter whose gradient is not the slope of the loss.

    Attributes:
        parameter: Its name.
        reverse: Autograd's gradient along a random direction of this parameter.
        numeric: The slope of the loss along it, from central differences.
        forward: The same from forward mode; None where an operation does not support it.
        uncertainty: Error of `numeric`.
    """

    parameter: str
    reverse: float
    numeric: float
    forward: float | None
    uncertainty: float

    def __str__(self) -> str:
        forward = "" if self.forward is None else f", forward mode {self.forward:.6g}"
        return (
            f"`{self.parameter}`: autograd says {self.reverse:.6g} along a random direction, central differences "
            f"{self.numeric:.6g} ± {self.uncertainty:.1g}{forward}: off by {self.difference:.3g}. {self._hint()}"
        )

    @property
    def difference(self) -> float:
        """By how much autograd is off: from central differences, or from forward mode if that is more."""
        others = [self.numeric] if self.forward is None else [self.numeric, self.forward]
        return max(abs(self.reverse - other) for other in others)

    def _hint(self) -> str:
        """Which of the three stands alone tells where to look."""
        if not math.isfinite(self.reverse):
            return "Look for a root, a logarithm or a division at 0."
        if self.forward is None:
            return "Look for a wrong backward, or a part that is cut out of the graph."
        alone = {
            "forward": abs(self.reverse - self.numeric),
            "numeric": abs(self.reverse - self.forward),
            "reverse": abs(self.numeric - self.forward),
        }
        return {
            "forward": "Look for a wrong jvp, or an edit through .data; training does not use forward mode.",
            "numeric": "Look for a part that is cut out of the graph: detach, .data, .item(), no_grad.",
            "reverse": "Look for a wrong backward.",
        }[min(alone, key=lambda name: alone[name])]


@dataclass
class GradientReport:
    """What a check saw.

    Attributes:
        disagreements: The parameters whose gradient is wrong.
        num_parameters: Parameter tensors that were checked.
        precision: What the check computed in: float64, or the module's own where it works in no other.
        largest_difference: Between autograd and central differences where they agree, over the gradient's norm.
        undecided: Parameters along which the loss had a kink wherever it was looked at.
        without_forward_mode: Why forward mode was left out, where it was.
        error: Why autograd gave no gradient at all, where it did not.
    """

    disagreements: list[Disagreement] = field(default_factory=list)
    num_parameters: int = 0
    precision: str = "float64"
    largest_difference: float = 0.0
    undecided: list[str] = field(default_factory=list)
    without_forward_mode: str | None = None
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the gradient."""
        return not self.disagreements and self.error is None

    def __str__(self) -> str:
        if self.error is not None:
            return f"gradient check: backward fails: {self.error}"
        if self.disagreements:
            wrong = "\n".join(f"  {each}" for each in self.disagreements)
            return f"gradient check: {len(self.disagreements)} of {self.num_parameters} parameters disagree\n{wrong}"
        methods = "central differences" if self.without_forward_mode else "central differences and forward mode"
        text = (
            f"gradient check: autograd, {methods} agree on {self.num_parameters} parameters "
            f"(to {self.largest_difference:.1g} of the gradient's norm, in {self.precision})"
        )
        if self.undecided:
            text += f"; at a kink, so undecided: {', '.join(self.undecided)}"
        if self.without_forward_mode:
            text += f"; forward mode left out: {self.without_forward_mode}"
        return text


def check(
    module: nn.Module, batch: Any, loss: Loss | None = None, num_directions: int = 1, seed: int = 0
) -> GradientReport:
    """Compares autograd's gradient of the training loss with central differences and with forward mode.

    For each parameter θₖ and a random unit vector v of its shape, three numbers must be one: ⟨∇ₖL, v⟩ of
    autograd, (L(θₖ + hv) − L(θₖ − hv)) / 2h, and the derivative that forward mode carries along v. In float64,
    with h = ε^(1/3) · max(1, ‖θₖ‖), the difference errs by about ε^(2/3) = 4e-11 of the loss; two numbers agree
    when they differ by less than ε^(1/3) = 6e-6 of the larger. That leaves half of the digits for functions less
    tame than the estimate, and an error smaller than that does no harm.

    Before it complains it makes sure: it measures the slope at seven steps, allows ten times the spread that it
    finds, and where the loss has a kink (a ReLU at 0, a tie of a maximum) it looks again at a place nearby.
    A disagreement can be meant: a straight-through estimator is one.

    The check works on copies, so that weights, gradients, buffers, metrics and training mode stay as they are,
    and so do all random states. What `training_step` does beside the module (a print, a direct call of a logger)
    it does at each evaluation: about 4 a parameter and direction.

    Args:
        module: Any LightningModule, in the mode (training or evaluation) in which it is to be checked.
        batch: One batch, as `training_step` gets it.
        loss: Maps (module, batch) to the loss. Needed where `training_step` cannot be used, as under manual
            optimization, and the module has no method `loss(batch)`.
        num_directions: Random directions a parameter. One misses a wrong gradient only if the error happens to be
            perpendicular to it.
        seed: Of the directions.

    Returns:
        What was seen; `passed` tells whether all agree, and `str` says it.

    Raises:
        ValueError: The loss cannot be had, is not finite, or changes from one evaluation to the next.

    Example:
        >>> line = nn.Linear(2, 1)
        >>> batch = torch.ones(3, 2), torch.zeros(3, 1)
        >>> report = check(line, batch, loss=lambda line, batch: (line(batch[0]) - batch[1]).square().mean())
        >>> report.passed, report.num_parameters
        (True, 2)

    Reference: Griewank and Walther (2008), Evaluating Derivatives, chapter 3, for the identity of the three.
    """
    function = _loss_function(module, batch, loss)
    report = GradientReport(precision=function.precision)
    try:
        here = _Place(function, function.parameters)
    except RuntimeError as error:  # such as an edit in place of what backward needs
        report.error = str(error)
        return report
    generator = torch.Generator().manual_seed(seed)
    for name in function.trainable:
        report.num_parameters += 1
        for _ in range(num_directions):
            if not _agrees(here, name, _unit_vector(here.parameters[name], generator), generator, report):
                break
    return report


def _loss_function(module: nn.Module, batch: Any, loss: Loss | None) -> LossFunction:
    """The loss in float64; in the module's own precision where it insists on that, by a cast or on its device."""
    try:
        function = LossFunction(module, batch, loss, torch.float64)
        values = _evaluate_twice(function)
    except Exception:
        function = LossFunction(module, batch, loss)
        values = _evaluate_twice(function)
    if not math.isfinite(values[0]):
        raise ValueError(f"Cannot check the gradient. This is because the loss is not finite: {values[0]}.")
    if abs(values[0] - values[1]) > ROUNDING * function.epsilon * abs(values[0]):
        raise ValueError(
            f"Cannot check the gradient. This is because the loss of the same batch and random state is "
            f"{values[0]} once and {values[1]} the next time: make `training_step` repeatable, or pass `loss`."
        )
    return function


def _evaluate_twice(function: LossFunction) -> tuple[float, float]:
    leaves = function.leaves(function.parameters)
    return float(function(leaves).detach()), float(function(leaves).detach())


class _Place:
    """A place in the space of the parameters: the loss there, autograd's gradient, and the loss along a line."""

    def __init__(self, function: LossFunction, parameters: dict[str, Tensor]) -> None:
        self.function = function
        self.parameters = parameters
        self.loss, self.gradient = function.value_and_gradient(parameters)
        self.gradient_norm = math.hypot(*(float(gradient.norm()) for gradient in self.gradient.values()))

    def reverse(self, name: str, direction: Tensor) -> float:
        return float((self.gradient[name] * direction).sum())

    def forward(self, name: str, direction: Tensor) -> float:
        leaves = self.function.leaves(self.parameters)
        # torch.func.jvp would refuse a custom autograd.Function in the older style, which has its jvp too.
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaves[name], direction.to(leaves[name]))
            tangent = forward_ad.unpack_dual(self.function({**leaves, name: dual})).tangent
        return 0.0 if tangent is None else float(tangent)

    def along(self, name: str, direction: Tensor) -> Callable[[float], float]:
        def loss(step: float) -> float:
            moved = self.parameters[name] + (step * direction).to(self.parameters[name])
            return float(self.function(self.function.leaves({**self.parameters, name: moved})).detach())

        return loss

    def nearby(self, generator: torch.Generator) -> "_Place":
        moved = {
            name: tensor + (MOVE * _scale(tensor) * _unit_vector(tensor, generator)).to(tensor)
            for name, tensor in self.parameters.items()
        }
        return _Place(self.function, moved)


def _unit_vector(like: Tensor, generator: torch.Generator) -> Tensor:
    direction = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)
    return direction / direction.norm()


def _scale(tensor: Tensor) -> float:
    return max(1.0, float(tensor.norm()))


def _agrees(here: _Place, name: str, direction: Tensor, generator: torch.Generator, report: GradientReport) -> bool:
    """Compares the three along one direction, and writes into the report what came of it."""
    place = here
    for _ in range(NUM_PLACES):
        verdict = _compare(place, name, direction, report)
        if verdict is not None:
            break
        place = here.nearby(generator)
    else:
        report.undecided.append(name)
        return True
    if isinstance(verdict, Disagreement):
        report.disagreements.append(verdict)
        return False
    report.largest_difference = max(report.largest_difference, verdict)
    return True


def _compare(place: _Place, name: str, direction: Tensor, report: GradientReport) -> Disagreement | float | None:
    """Returns what is wrong, or the relative difference where nothing is, or None at a kink."""
    epsilon = place.function.epsilon
    scale = _scale(place.parameters[name])
    step = epsilon ** (1 / 3) * scale
    noise = ROUNDING * epsilon * abs(place.loss) / step
    along = place.along(name, direction)
    reverse, forward = place.reverse(name, direction), None
    try:
        forward = place.forward(name, direction)
    except RuntimeError as error:  # an operation, or a custom Function, without a formula for it
        report.without_forward_mode = str(error).splitlines()[0]

    def agree(other: float, error: float) -> bool:
        return abs(reverse - other) <= epsilon ** (1 / 3) * max(abs(reverse), abs(other)) + error

    numeric, error = central_difference(along, step), noise
    forward_agrees = forward is None or agree(forward, noise)
    if not agree(numeric, noise):
        slope = measure_slope(along, scale)
        numeric, error = slope.value, 10 * slope.uncertainty + noise
        if math.isfinite(reverse) and slope.kink > 0.1 * abs(reverse - numeric):
            return None
    if forward_agrees and agree(numeric, error):
        return abs(reverse - numeric) / place.gradient_norm if reverse != numeric else 0.0
    return Disagreement(name, reverse, numeric, forward, error)
