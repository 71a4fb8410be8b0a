"""A quadratic loss as pictures need it: along one direction, and on the plane of two."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from downslope.gradients.least_squares import LeastSquares


@dataclass(frozen=True)
class Parabola:
    """The loss along the negative gradient, L(θ − ηg) = loss − slope·η + ½·curvature·η².

    Attributes:
        loss: L(θ).
        slope: ‖g‖².
        curvature: gᵀHg.
    """

    loss: float
    slope: float
    curvature: float

    def __call__(self, learning_rate: float) -> float:
        """Returns L(θ − ηg)."""
        return self.loss - self.slope * learning_rate + self.curvature * learning_rate**2 / 2

    @property
    def best(self) -> float:
        """The η of least loss: 1/λ_g, with λ_g = gᵀHg/gᵀg the curvature along the gradient. Twice it buys nothing."""
        return self.slope / self.curvature


def loss_along_gradient(
    line: LeastSquares, parameters: Float[Tensor, " num_parameters"], change: Float[Tensor, " num_parameters"]
) -> tuple[Parabola, float]:
    """Returns the exact loss along −g, where g is the gradient of the loss over all rows, and the η that a step took.

    Args:
        line: The loss, L(θ) = L* + ½(θ − θ*)ᵀH(θ − θ*).
        parameters: θ, float64: the weights, then the bias.
        change: Δ, the step from there. As far as it follows the gradient, η = −Δᵀg/‖g‖²: the learning rate itself, for
            plain gradient descent on all rows.

    Raises:
        ValueError: g is zero, and no direction.

    Example:
        L = ½(θ₁² + 4θ₂²) at (0, 1), where g = (0, 4): λ_g = 4, and the best step is 1/4.

        >>> line = LeastSquares(torch.zeros(2).double(), 0.0, torch.tensor([1.0, 4.0]).double(), torch.eye(2).double())
        >>> theta, change = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.0, -2.0]).double()
        >>> parabola, learning_rate = loss_along_gradient(line, theta, change)
        >>> parabola.best, learning_rate, parabola(0.0), parabola(0.25), parabola(0.5)
        (0.25, 0.5, 2.0, 0.0, 2.0)
    """
    hessian = _hessian(line)
    offset = parameters - line.parameters
    gradient = hessian @ offset
    slope = float(gradient @ gradient)
    if slope == 0:
        raise ValueError("Cannot follow a gradient of zero.")
    parabola = Parabola(line.loss + float(gradient @ offset) / 2, slope, float(gradient @ hessian @ gradient))
    return parabola, -float(change @ gradient) / slope


def _hessian(line: LeastSquares) -> Tensor:
    return line.eigenvectors * line.eigenvalues @ line.eigenvectors.T


@dataclass(frozen=True, eq=False)
class Plane:
    """A quadratic loss on a plane through its optimum, L(x) = loss + ½(x − optimum)ᵀH(x − optimum).

    Attributes:
        path: The parameters' places on it, one row a point.
        optimum: Where the loss is least.
        hessian: H on the plane.
        loss: The least loss.
    """

    path: Float[Tensor, "num_points 2"]
    optimum: Float[Tensor, "2"]
    hessian: Float[Tensor, "2 2"]
    loss: float


def plane_of(line: LeastSquares, path: Float[Tensor, "num_points num_parameters"]) -> Plane:
    """Returns the plane to look at: of the two parameters themselves or, of more, of H's two extreme eigenvectors.

    There the origin is the optimum, the first axis the steepest direction, the second the flattest, and a point's
    place is its projection.

    Args:
        line: The loss.
        path: Parameters, float64.
    """
    if path.shape[1] == 2:
        return Plane(path, line.parameters, _hessian(line), line.loss)
    axes = line.eigenvectors[:, [-1, 0]]
    centre = torch.zeros(2, dtype=torch.float64)
    return Plane((path - line.parameters) @ axes, centre, torch.diag(line.eigenvalues[[-1, 0]]), line.loss)
