"""Is the gradient right? Autograd against central differences and forward mode, for any LightningModule."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.autograd import forward_ad

from downslope.gradients.slope import central_difference, measure_slope
from downslope.gradients.vectors import real
from downslope.steps.loss import BatchLoss, Loss, Parameters

NUM_PLACES = 4  # looked at nearby, until one has no kink
MOVE = 1e-3  # relative: far enough from a kink, near enough to be the same model
ROUNDING = 100  # a loss adds up many terms, so that it errs by more than one ε


@dataclass(frozen=True)
class Comparison:
    """The derivative of the loss along a random direction of one parameter, three times.

    Attributes:
        parameter: Its name.
        reverse: From autograd's gradient.
        numeric: From central differences, `error` of it uncertain.
        forward: From forward mode; None where an operation does not support it.
        tolerance: Relative, of any two of them.
        noise: What rounding may add to any of them.
    """

    parameter: str
    reverse: float
    numeric: float
    forward: float | None
    error: float
    tolerance: float
    noise: float

    @property
    def agrees(self) -> bool:
        """Whether autograd is right, as far as the other two can tell."""
        return self._is_near(self.numeric, self.error) and (
            self.forward is None or self._is_near(self.forward, self.noise)
        )

    def _is_near(self, other: float, error: float) -> bool:
        return abs(self.reverse - other) <= self.tolerance * max(abs(self.reverse), abs(other)) + error

    @property
    def difference(self) -> float:
        """By how much autograd is off: from central differences, or from forward mode if that is more."""
        return max(abs(self.reverse - other) for other in (self.numeric, self.forward) if other is not None)

    def __str__(self) -> str:
        forward = "" if self.forward is None else f", forward mode {self.forward:.6g}"
        return (
            f"`{self.parameter}`: autograd says {self.reverse:.6g} along a random direction, "
            f"central differences {self.numeric:.6g} ± {self.error:.1g}{forward}: "
            f"off by {self.difference:.3g}. {self._hint()}"
        )

    def _hint(self) -> str:
        """Which of the three stands alone tells where to look."""
        if not math.isfinite(self.reverse):
            return "Look for a root, a logarithm or a division at 0."
        if self.forward is None:
            return "Look for a wrong backward, or a part that is cut out of the graph."
        others_apart = {
            "Look for a wrong backward.": abs(self.numeric - self.forward),
            "Look for a part that is cut out of the graph: detach, .data, no_grad.": abs(self.reverse - self.forward),
            "Look for a wrong jvp, or an edit of .data; training uses neither.": abs(self.reverse - self.numeric),
        }
        return min(others_apart, key=lambda hint: others_apart[hint])


@dataclass
class GradientReport:
    """What a check saw.

    Attributes:
        precision: What the check computed in: float64, or the module's own where it works in no other.
        disagreements: One for each parameter whose gradient is wrong.
        num_parameters: Parameter tensors that were checked.
        largest_difference: Between autograd and central differences where they agree, over the gradient's norm.
        undecided: Parameters along which the loss had a kink wherever it was looked at.
        without_forward_mode: Why forward mode was left out, where it was.
        error: Why autograd gave no gradient at all, where it did not.
    """

    precision: str
    disagreements: list[Comparison] = field(default_factory=list)
    num_parameters: int = 0
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
            share = f"{len(self.disagreements)} of {self.num_parameters} parameters"
            return "\n  ".join([f"gradient check: {share} disagree", *map(str, self.disagreements)])
        methods = "central differences" if self.without_forward_mode else "central differences and forward mode"
        parts = [
            f"gradient check: autograd, {methods} agree on {self.num_parameters} parameters "
            f"(to {self.largest_difference:.1g} of the gradient's norm, in {self.precision})",
            f"at a kink, so undecided: {', '.join(self.undecided)}" if self.undecided else "",
            f"forward mode left out: {self.without_forward_mode}" if self.without_forward_mode else "",
        ]
        return "; ".join(filter(None, parts))


def check(
    module: nn.Module, batch: Any, loss: Loss | None = None, num_directions: int = 1, seed: int = 0
) -> GradientReport:
    """Compares autograd's gradient of the training loss with central differences and with forward mode.

    For each parameter θₖ and a random unit vector v of its shape, three numbers must be one: ⟨∇ₖL, v⟩ of
    autograd, (L(θₖ + hv) − L(θₖ − hv)) / 2h, and the derivative that forward mode carries along v. In
    float64, with h = ε^(1/3) · max(1, ‖θₖ‖), the difference errs by about ε^(2/3) = 4e-11 of the loss. Two
    numbers agree when they differ by less than ε^(1/3) = 6e-6 of the larger: half of the digits are left for
    functions less tame than the estimate, and a smaller error does no harm.

    Before it complains it looks closely: at a place nearby, since at a kink (a ReLU at 0, a tie of a maximum) autograd
    is free to give any slope in between; and with seven steps, allowing for ten times the spread of what they give. A
    disagreement can be meant: a straight-through estimator is one, and so is spectral normalisation, whose power
    iteration autograd takes for constant.

    The loss is computed about 4 times a parameter, on copies, in float64 where the module's code allows it
    (`downslope.steps.loss.BatchLoss`).

    Args:
        module: Any LightningModule, in the mode (training or evaluation) in which it is to be checked.
        batch: One batch, as `training_step` gets it.
        loss: As for `downslope.steps.loss.BatchLoss`.
        num_directions: Random ones a parameter. One misses a wrong gradient only if the error is perpendicular to it.
        seed: Of the directions.

    Returns:
        What was seen; `passed` tells whether all agree, and `str` says it.

    Raises:
        ValueError: The loss cannot be had, is not finite, changes from one evaluation to the next, or has consequences.

    Example:
        >>> batch = torch.ones(3, 2), torch.zeros(3, 1)
        >>> mean_squared_error = lambda line, batch: (line(batch[0]) - batch[1]).square().mean()
        >>> report = check(nn.Linear(2, 1), batch, loss=mean_squared_error)
        >>> report.passed, report.num_parameters
        (True, 2)

    Reference: Griewank and Walther (2008), Evaluating Derivatives, chapter 3, for the identity of the three.
    """
    batch = move_data_to_device(batch, next(module.parameters(), torch.empty(0)).device)
    for dtype in (torch.float64, None):  # the second where the module's code or its device insists on its own precision
        function = BatchLoss(module, batch, loss, dtype=dtype, precise=True)
        try:
            with function.measuring():
                _evaluate_twice(function)
                return _report(function, num_directions, seed)
        except (RuntimeError, TypeError):
            if dtype is None:
                raise
    raise AssertionError


def _evaluate_twice(function: BatchLoss) -> None:
    first, second = (float(function(function.leaves(function.parameters)).detach()) for _ in range(2))
    if not math.isfinite(first):
        raise ValueError(f"Cannot check the gradient. This is because the loss is not finite: {first}.")
    if abs(first - second) > ROUNDING * _epsilon(function.parameters) * abs(first):
        raise ValueError(
            "Cannot check the gradient. This is because the loss of the same batch and random state is "
            f"{first:.8g} once and {second:.8g} the next time: make `loss` repeatable."
        )


def _epsilon(parameters: Parameters) -> float:
    """The relative rounding error of the coarsest parameter."""
    reals = [each for each in map(real, parameters.values()) if each.is_floating_point()]
    return max((torch.finfo(each.dtype).eps for each in reals), default=0.0)


def _report(function: BatchLoss, num_directions: int, seed: int) -> GradientReport:
    kinds = {str(each.dtype).removeprefix("torch.") for each in function.parameters.values()}
    report = GradientReport(precision=" and ".join(sorted(kinds)))
    try:
        here = _Place(function, function.parameters)
    except RuntimeError as error:  # such as an edit in place of what backward needs
        report.error = str(error)
        return report
    generator = torch.Generator().manual_seed(seed)
    for name in function.trainable:
        report.num_parameters += 1
        for _ in range(num_directions):
            comparison = _compare(here, name, generator)
            if comparison is None:
                report.undecided.append(name)
            elif comparison.agrees:
                difference = abs(comparison.reverse - comparison.numeric) / (here.gradient_norm or 1.0)
                report.largest_difference = max(report.largest_difference, difference)
                continue
            else:
                report.disagreements.append(comparison)
            break
    report.without_forward_mode = here.without_forward_mode
    return report


class _Place:
    """A place in the space of the parameters: the loss there, its gradient, and its slope along a line."""

    def __init__(self, function: BatchLoss, parameters: Parameters) -> None:
        self.function = function
        self.parameters = parameters
        self.epsilon = _epsilon(parameters)
        self.loss, self.gradient = function.value_and_gradient(parameters)
        self.gradient_norm = math.hypot(*(float(gradient.norm()) for gradient in self.gradient.values()))
        self.without_forward_mode: str | None = None

    def forward(self, name: str, direction: Tensor) -> float | None:
        leaves = self.function.leaves(self.parameters)
        try:
            # torch.func.jvp would refuse a custom autograd.Function in the older style, which may well have a jvp.
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(leaves[name], direction.to(leaves[name]))
                tangent = forward_ad.unpack_dual(self.function({**leaves, name: dual})).tangent
        except RuntimeError as error:  # an operation, or a custom Function, without a formula for it
            self.without_forward_mode = str(error).splitlines()[0]
            return None
        return 0.0 if tangent is None else float(tangent.detach())

    def along(self, name: str, direction: Tensor) -> Callable[[float], float]:
        loss = self.function.along(self.parameters, {name: direction.to(self.parameters[name])})
        return lambda step: float(loss(step))

    def nearby(self, generator: torch.Generator) -> "_Place":
        moved = {
            name: tensor + (MOVE * _scale(tensor) * _unit_vector(tensor, generator)).to(tensor)
            for name, tensor in self.parameters.items()
        }
        return _Place(self.function, moved)

    def compare(self, name: str, direction: Tensor) -> Comparison:
        """Compares with one central difference."""
        tolerance = self.epsilon ** (1 / 3)
        step = tolerance * _scale(self.parameters[name])
        noise = ROUNDING * self.epsilon * abs(self.loss) / step
        return Comparison(
            parameter=name,
            reverse=float((real(self.gradient[name]) * real(direction)).sum()),
            numeric=central_difference(self.along(name, direction), step),
            forward=self.forward(name, direction),
            error=noise,
            tolerance=tolerance,
            noise=noise,
        )


def _compare(here: _Place, name: str, generator: torch.Generator) -> Comparison | None:
    """Compares along one random direction; None where the loss has a kink wherever it is looked at."""
    direction = _unit_vector(here.parameters[name], generator)
    comparison = here.compare(name, direction)
    if comparison.agrees or not math.isfinite(comparison.reverse):
        return comparison
    for _ in range(NUM_PLACES):
        place = here.nearby(generator)
        once = place.compare(name, direction)
        slope = measure_slope(place.along(name, direction), _scale(place.parameters[name]))
        closely = replace(once, numeric=slope.value, error=10 * slope.uncertainty + once.noise)
        is_smooth = slope.kink <= 0.1 * abs(once.reverse - slope.value)
        if closely.agrees or is_smooth:
            return closely
    return None


def _unit_vector(like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.complex128 if like.is_complex() else torch.float64
    direction = torch.randn(like.shape, generator=generator, dtype=dtype).to(like.device)
    return direction.div(direction.norm())


def _scale(tensor: Tensor) -> float:
    return max(1.0, float(tensor.norm()))
