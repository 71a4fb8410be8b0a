"""What is left to do on a line's parabola, exactly: along which direction, and how many steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from downslope.gradients.least_squares import LeastSquares

MAX_STEPS = 2**50


@dataclass(frozen=True)
class Outlook:
    """Where a line stands between its first weights and least squares.

    Attributes:
        excess: L(θ) − L(θ*) = ½ Σ λᵢ cᵢ², with cᵢ the distance to the optimum along the i-th eigenvector of H.
        condition_number: λ_max / λ_min, of the eigenvalues that are not zero.
        direction: The eigen-direction that will be the last to hold error, in the features' names: `s1 − s2`.
        share: Of the excess, what that direction holds.
        decay: |1 − ηλ|, the factor of its error at each step of plain gradient descent.
        young_share: Of the excess, what lies along directions that have not had the time to shrink to a third.
        num_steps: Further steps of plain gradient descent on all rows until the excess is at most the target; None
            where it never will be.
    """

    excess: float
    condition_number: float
    direction: str
    share: float
    decay: float
    num_steps: int | None
    young_share: float = 0.0


def outlook(
    line: LeastSquares,
    parameters: Float[Tensor, " num_parameters"],
    learning_rate: float,
    target: float,
    names: Sequence[str] = (),
    time: float = 0.0,
) -> Outlook:
    """Returns what is left to do at θ under the rate η.

    Along eigenvector i plain gradient descent multiplies the error by 1 − ηλᵢ each step, so that after k steps the
    excess is ½ Σ λᵢ cᵢ² (1 − ηλᵢ)²ᵏ: the steps still needed are about ln(1/ε) / (2ηλ) of the flattest direction that
    holds error, and are found here from all of them.

    Args:
        line: The closed form.
        parameters: θ, weights then bias.
        learning_rate: η.
        target: Excess loss at which the line has arrived.
        names: Of the features; x1, x2, … without.
        time: Σ η until now: what began along a flat direction with λᵢ Σ η < 1 is still there.

    Example:
        Two directions, λ = 2 and 0.2, with error 1 along each; at η = 0.5 the first is gone after one step:

        >>> flat = torch.tensor([0.2, 2.0], dtype=torch.float64)
        >>> line = LeastSquares(torch.zeros(2, dtype=torch.float64), 0.0, flat, torch.eye(2, dtype=torch.float64))
        >>> seen = outlook(line, torch.ones(2), 0.5, target=0.1 * 0.9**20)
        >>> seen.num_steps, seen.direction, round(seen.decay, 6), round(seen.condition_number, 6)
        (10, 'x1', 0.9, 10.0)
    """
    curvatures, energies = _energies(line, parameters)
    factors = (1 - learning_rate * curvatures).abs()
    excess = float(energies.sum())
    last = _last_to_hold_error(energies, factors, target)
    num_steps = float(_num_steps(energies, factors[None], target))
    return Outlook(
        excess=excess,
        condition_number=float(curvatures[-1] / curvatures[0]),
        direction=_name(line.eigenvectors[:, last - len(curvatures)], names),
        share=float(energies[last]) / excess if excess > 0 else 0.0,
        decay=float(factors[last]),
        num_steps=None if num_steps == math.inf else int(num_steps),
        young_share=float(energies[curvatures * time < 1].sum()) / excess if excess > 0 else 0.0,
    )


def best_learning_rate(
    line: LeastSquares, parameters: Float[Tensor, " num_parameters"], target: float, num_rates: int = 200
) -> float:
    """Returns the rate that brings plain gradient descent from θ to the target in the fewest steps.

    It depends on where the error lies: 2/(λ_max + λ_min) is the best for the worst start; where the flattest directions
    hold too little to matter, 1/λ_max is nearer. The closed form is asked for many rates from 1/(2λ_max) up to the
    former, but no higher than 3/(2λ_max): nearer to the edge the steepest direction bounces for long, for at most a
    quarter fewer steps. Of equal ones 1/λ_max is taken, or the middle.

    Example:
        All error along λ = 2: one step of ½ is enough.

        >>> flat = torch.tensor([0.2, 2.0], dtype=torch.float64)
        >>> line = LeastSquares(torch.zeros(2, dtype=torch.float64), 0.0, flat, torch.eye(2, dtype=torch.float64))
        >>> round(best_learning_rate(line, torch.tensor([0.0, 1.0]), target=1e-3), 2)
        0.5
    """
    curvatures, energies = _energies(line, parameters)
    largest = min(2 / float(curvatures[-1] + curvatures[0]), 1.5 / line.sharpness)
    rates = torch.linspace(0.5 / line.sharpness, largest, num_rates, dtype=torch.float64)
    rates = torch.cat([rates, rates.new_tensor([1 / line.sharpness])])
    needed = _num_steps(energies, (1 - rates[:, None] * curvatures).abs(), target)
    fewest = rates[needed == needed.min()].tolist()
    return float(fewest[len(fewest) // 2]) if fewest[-1] != float(rates[-1]) else float(rates[-1])


def _energies(line: LeastSquares, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues that are not zero, and the excess loss ½λᵢcᵢ² along each."""
    floor = len(line.eigenvalues) * torch.finfo(torch.float64).eps * line.sharpness
    kept = line.eigenvalues > floor
    error = parameters.detach().cpu().double() - line.parameters
    curvatures = line.eigenvalues[kept]
    return curvatures, 0.5 * curvatures * (line.eigenvectors.T @ error)[kept].square()


def _num_steps(energies: Tensor, factors: Tensor, target: float) -> Tensor:
    """The fewest steps for each row of factors, infinity for none, by bisection: below the edge it only falls."""

    def has_arrived(num_steps: Tensor) -> Tensor:
        return (energies * factors.pow(2.0 * num_steps[:, None])).sum(1) <= target

    low, high = torch.zeros(len(factors), dtype=torch.long), torch.full((len(factors),), MAX_STEPS)
    never = ~has_arrived(high) | (factors[:, energies > 0] >= 1).any(1) | ~energies.isfinite().all()
    never &= ~has_arrived(low)
    while bool((low < high).any()):
        middle = (low + high) // 2
        arrived = has_arrived(middle)
        low, high = low.where(arrived, middle + 1), high.where(~arrived, middle)
    return high.double().where(~never, math.inf)


def _last_to_hold_error(energies: Tensor, factors: Tensor, target: float) -> int:
    """The direction that needs the most steps until its share of the target is reached."""
    share = max(target, torch.finfo(torch.float64).tiny) / len(energies)
    steps = (energies / share).clamp(min=1.0).log() / -factors.clamp(1e-300, 1 - 1e-16).square().log()
    return int(torch.where(factors >= 1, energies * math.inf, steps).nan_to_num(0.0, posinf=math.inf).argmax())


def _name(vector: Tensor, names: Sequence[str], num_named: int = 3) -> str:
    """The direction's largest parts, the first with a plus: `s1 − s2`."""
    every = [*(names or [f"x{index + 1}" for index in range(len(vector) - 1)]), "bias"]
    if len(every) != len(vector):
        every = [f"x{index + 1}" for index in range(len(vector))]
    order = vector.abs().argsort(descending=True).tolist()[:num_named]
    shown = [index for index in order if abs(float(vector[index])) >= 0.5 * float(vector.abs().max())]
    sign = math.copysign(1.0, float(vector[shown[0]]))
    parts = [("− " if sign * float(vector[index]) < 0 else "+ ") + every[index] for index in shown]
    return " ".join(parts).removeprefix("+ ")
