"""The closed form of a line under the mean squared error: the optimum, the Hessian, the limit of the step.

Whatever training claims about a linear regression can be held against this.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_ONCE = 65_536  # bounds the float64 copy


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """The mean squared error L(θ) = (1/N)‖Zθ − y‖² of a line, exactly; Z is the features and a column of ones.

    Attributes:
        parameters: The θ that minimises L (the shortest one, where several do): the weights, then the bias.
        loss: L there: no line has less on these rows.
        eigenvalues: Of the Hessian H = (2/N)ZᵀZ, in ascending order.
        eigenvectors: Of H, one a column; the last entry of each belongs to the bias.
    """

    parameters: Float[Tensor, " num_parameters"]
    loss: float
    eigenvalues: Float[Tensor, " num_parameters"]
    eigenvectors: Float[Tensor, "num_parameters num_parameters"]

    @property
    def sharpness(self) -> float:
        """λ, the largest eigenvalue of the Hessian."""
        return float(self.eigenvalues[-1])

    @property
    def largest_stable_learning_rate(self) -> float:
        """2/λ: above it, plain gradient descent on all rows diverges."""
        return 2.0 / self.sharpness


@runtime_checkable
class HasLeastSquares(Protocol):
    """A module whose training loss is an exact quadratic of its parameters: the weights, then the bias."""

    def least_squares(self) -> LeastSquares | None:
        """Returns the loss over all training rows in closed form; None where it is not known."""
        ...


def least_squares(features: Float[Tensor, "num_rows num_features"], target: Float[Tensor, " num_rows"]) -> LeastSquares:
    """Solves y = Wx + b for the least mean squared error, in float64 on the CPU.

    From the normal equations Hθ = (2/N)Zᵀy by the eigenvalues of H, which are of interest themselves. An
    eigenvalue below num_parameters · ε · λ counts as zero; an error of θ of relative size κε enters the loss
    squared.

    Args:
        features: X, one row a sample.
        target: y, one value a row.

    Returns:
        Optimum, loss and spectrum.

    Example:
        Through (0, 1), (1, 3), (2, 5) runs y = 2x + 1, and H = (2/3)[[5, 3], [3, 3]]:

        >>> line = least_squares(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 3.0, 5.0]))
        >>> [round(value, 6) for value in line.parameters.tolist()]
        [2.0, 1.0]
        >>> round(line.sharpness, 6), round((2 / 3) * (4 + 10**0.5), 6)
        (4.774852, 4.774852)

    Reference: Björck (1996), Numerical Methods for Least Squares Problems, section 2.2.
    """
    num_rows, num_parameters = len(target), features.shape[1] + 1
    second_moment = torch.zeros(num_parameters, num_parameters, dtype=torch.float64)
    correlation = torch.zeros(num_parameters, dtype=torch.float64)
    for inputs, outputs in _chunks(features, target):
        second_moment += inputs.T @ inputs / num_rows
        correlation += inputs.T @ outputs / num_rows
    eigenvalues, eigenvectors = torch.linalg.eigh(2 * second_moment)
    inverse = torch.where(
        eigenvalues > num_parameters * torch.finfo(torch.float64).eps * eigenvalues[-1], 1 / eigenvalues, 0.0
    )
    parameters = eigenvectors @ (inverse * (eigenvectors.T @ (2 * correlation)))
    loss = sum(float((inputs @ parameters - outputs).square().sum()) for inputs, outputs in _chunks(features, target))
    return LeastSquares(parameters, loss / num_rows, eigenvalues, eigenvectors)


def _chunks(features: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (Z, y) in float64, some rows at a time."""
    for rows, outputs in zip(features.split(ROWS_AT_ONCE), target.split(ROWS_AT_ONCE), strict=True):
        inputs = torch.nn.functional.pad(rows.detach().cpu().double(), (0, 1), value=1.0)
        yield inputs, outputs.detach().cpu().double()
