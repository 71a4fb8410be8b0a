"""The closed form of a line under the mean squared error: the optimum, the Hessian, the limit of the step.

Whatever training claims about a linear regression can be held against this.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

log = logging.getLogger(__name__)

Chunks = Callable[[], Iterable[tuple[Tensor, ...]]]
Spectrum = tuple[Tensor, Tensor]

ROWS_AT_ONCE = 65_536  # bounds the float64 copy
MOST_CURVATURES = 1_500  # some seconds; the time of an eigendecomposition grows with the cube
ZERO = 1e-26  # of x̄²: variance of a constant feature, by the rounding of its mean


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """The mean squared error L(θ) = (1/N)‖Zθ − y‖² of a line, exactly; Z is the features and a column of ones.

    Attributes:
        parameters: A θ that minimises L: the weights, then the bias.
        loss: L there: no line has less on these rows.
        eigenvalues: Of the Hessian H = (2/N)ZᵀZ, in ascending order; of fewer rows than parameters those that can be
            other than zero, and where there are too many of them the largest two.
        eigenvectors: Of H, one a column; the last entry of each belongs to the bias.
        is_complete: Whether these are all curvatures there are. Not so where they are too many, nor where a feature is
            so far from 0, for its spread, that float64 cannot tell its curvature from none.
    """

    parameters: Float[Tensor, " num_parameters"]
    loss: float
    eigenvalues: Float[Tensor, " num_curvatures"]
    eigenvectors: Float[Tensor, "num_parameters num_curvatures"]
    is_complete: bool = True

    @property
    def sharpness(self) -> float:
        """λ, the largest eigenvalue of the Hessian."""
        return float(self.eigenvalues[-1])

    @property
    def largest_stable_learning_rate(self) -> float:
        """2/λ: above it, plain gradient descent on all rows diverges."""
        return 2.0 / self.sharpness

    def excess(self, parameters: Float[Tensor, " num_parameters"]) -> float | None:
        """Returns L(θ) − L(θ*) = ½ Σ λᵢ (vᵢ·(θ − θ*))², in float64; None where not all curvatures are known.

        Example:
            (θ − 3)² + 5 at 1:

            >>> three, two, one = torch.tensor([3.0]).double(), torch.tensor([2.0]).double(), torch.eye(1).double()
            >>> LeastSquares(three, 5.0, two, one).excess(torch.tensor([1.0]))
            4.0
        """
        along = self.eigenvectors.T @ (parameters.detach().cpu().double() - self.parameters)
        return 0.5 * float((self.eigenvalues * along.square()).sum()) if self.is_complete else None

    def decayed(self, weight_decay: float) -> "LeastSquares":
        """Returns the closed form of L(θ) + ½w‖θ‖², which weight decay within the gradient (SGD, Adam) minimises.

        H + wI has the same eigenvectors, and its optimum is Σ λᵢ/(λᵢ + w) vᵢvᵢᵀθ*. Decay apart from the gradient, as
        AdamW's, minimises nothing of the kind.

        Example:
            (θ − 3)² + θ² is least half way, and 9/2 there:

            >>> three, two, one = torch.tensor([3.0]).double(), torch.tensor([2.0]).double(), torch.eye(1).double()
            >>> line = LeastSquares(three, 0.0, two, one).decayed(2.0)
            >>> line.parameters.item(), line.loss, line.sharpness
            (1.5, 4.5, 4.0)
        """
        along = self.eigenvectors.T @ self.parameters
        kept = along * self.eigenvalues / (self.eigenvalues + weight_decay)
        missed = 0.5 * float((self.eigenvalues * (along - kept).square()).sum())
        return LeastSquares(
            parameters=self.eigenvectors @ kept,
            loss=self.loss + missed + 0.5 * weight_decay * float(kept.square().sum()),
            eigenvalues=self.eigenvalues + weight_decay,
            eigenvectors=self.eigenvectors,
            is_complete=self.is_complete and len(along) == len(self.parameters),
        )


@runtime_checkable
class HasLeastSquares(Protocol):
    """A module whose training loss is an exact quadratic of its parameters: the weights, then the bias."""

    def least_squares(self) -> LeastSquares | None:
        """Returns the loss over all training rows in closed form; None where it is not known."""
        ...


def loss_of_lines(
    weights: Tensor, biases: Tensor, features: Tensor, target: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Returns the mean squared error of many lines at once, (1/N) Σ w (prediction − target)² for each.

    Args:
        weights: One line after the other (lines, targets, features).
        biases: Theirs (lines, targets).
        features: One row a sample.
        target: One value a row, or a column for each target.
        weight: What a row counts; 1 when None.

    Example:
        >>> two = torch.tensor([[[1.0]], [[2.0]]]), torch.zeros(2, 1)
        >>> loss_of_lines(*two, torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0]))
        tensor([0.0000, 2.5000])
    """
    predictions = (features @ weights.flatten(0, 1).T + biases.flatten()).unflatten(1, biases.shape)
    errors: Tensor = (predictions - target.reshape(len(target), 1, -1)).square().mean(dim=2)
    return (errors if weight is None else weight.reshape(-1, 1) * errors).mean(dim=0)


def least_squares(
    features: Float[Tensor, "num_rows num_features"],
    target: Float[Tensor, " num_rows"],
    weight: Float[Tensor, " num_rows"] | None = None,
) -> LeastSquares:
    """Solves y = Wx + b for the least mean squared error, in float64 on the CPU.

    With features and target centred, and each feature in units of its spread, W solves the normal equations of their
    correlations, or, of fewer rows than features, the centred equations themselves; then b = ȳ − Wx̄. What is not
    centred would lose the slope of a time stamp next to its intercept.

    Args:
        features: X, one row a sample.
        target: y, one value a row.
        weight: What each row counts; its mean must be 1.

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
    tensors = [each for each in (features, target, weight) if each is not None]
    return least_squares_of(lambda: zip(*(each.split(ROWS_AT_ONCE) for each in tensors), strict=True))


def least_squares_of(chunks: Chunks) -> LeastSquares:
    """Solves as `least_squares` does, for rows that need not be in memory together.

    Args:
        chunks: Yields features, target and, where there is one, weight of some rows at a time, whenever it is called.
    """
    num_rows, mean, level = _means(chunks)
    num_features = len(mean)
    gather = _of_few_rows if num_rows <= num_features else _of_many_rows
    system, response, variance, (eigenvalues, eigenvectors) = gather(chunks, num_rows, mean, level)
    scale = torch.where(variance > 0, variance, 1.0).rsqrt()
    rounding = torch.finfo(torch.float64).eps * (num_features + 1)
    if num_rows > num_features:
        system, response = scale[:, None] * system * scale, scale * response
        slope = _by_cholesky(system, response)
        if slope is None:
            system, response = _triangle(chunks, mean, level, scale)
            slope = _by_singular_values(system, response, num_rows)
    else:
        slope = _by_singular_values(system * scale, response, num_features)
    slope = scale * slope
    errors = (((inputs - mean) @ slope - (outputs - level)) * root for inputs, outputs, root in _doubles(chunks))
    # Of one feature and the bias alone: a bound of the least curvature, which centring knows and H has to tell from 0.
    least = 2 * variance / (1 + mean.square() + variance)
    is_resolved = bool((least[variance > ZERO * mean.square()] > rounding * eigenvalues[-1]).all())
    return LeastSquares(
        parameters=torch.cat([slope, (level - mean @ slope)[None]]),
        loss=sum(float(error.square().sum()) for error in errors) / num_rows,
        eigenvalues=eigenvalues,
        eigenvectors=eigenvectors,
        is_complete=is_resolved and min(num_rows, num_features + 1) <= MOST_CURVATURES,
    )


def _of_many_rows(
    chunks: Chunks, num_rows: int, mean: Tensor, level: Tensor
) -> tuple[Tensor, Tensor, Tensor, Spectrum]:
    """The covariances, added up over some rows at a time, the variances, and the spectrum of H."""
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    correlation = torch.zeros(len(mean), dtype=torch.float64)
    for inputs, outputs, root in _doubles(chunks):
        centred = (inputs - mean) * root[:, None]
        covariance += centred.T @ centred / num_rows
        correlation += centred.T @ ((outputs - level) * root) / num_rows
    row = torch.nn.functional.pad(mean, (0, 1), value=1.0)
    hessian = 2 * (torch.nn.functional.pad(covariance, (0, 1, 0, 1)) + torch.outer(row, row))
    return covariance, correlation, covariance.diagonal(), _spectrum(hessian)


def _of_few_rows(chunks: Chunks, num_rows: int, mean: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor, Spectrum]:
    """The centred equations themselves, the variances, and H's spectrum from the smaller of its two Gram matrices."""
    inputs, outputs, root = (torch.cat(each) for each in zip(*_doubles(chunks), strict=True))
    factor = torch.nn.functional.pad(inputs, (0, 1), value=1.0) * math.sqrt(2 / num_rows) * root[:, None]
    eigenvalues, left = _spectrum(factor @ factor.T)
    kept = eigenvalues > num_rows * torch.finfo(torch.float64).eps * eigenvalues[-1]
    eigenvalues, left = eigenvalues[kept], left[:, kept]
    centred, response = (inputs - mean) * root[:, None], (outputs - level) * root
    return centred, response, centred.square().mean(0), (eigenvalues, factor.T @ left / eigenvalues.sqrt())


def _means(chunks: Chunks) -> tuple[int, Tensor, Tensor]:
    sums = [  # as numbers: a small tensor that is kept would keep the chunk's memory from being used again
        (len(outputs), (inputs * root[:, None].square()).sum(0).tolist(), (outputs * root.square()).sum().item())
        for inputs, outputs, root in _doubles(chunks)
    ]
    counts, *totals = zip(*sums, strict=True)
    num_rows = sum(counts)
    inputs, outputs = (torch.tensor(each, dtype=torch.float64).sum(0) / num_rows for each in totals)
    return num_rows, inputs, outputs


def _by_cholesky(system: Tensor, response: Tensor) -> Tensor | None:
    """The solution of the normal equations, None where that loses more than half of the digits."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed or float(factor.diagonal().min()) <= 1e-4:
        return None
    solution: Tensor = torch.cholesky_solve(response[:, None], factor)
    return solution[:, 0]


def _triangle(chunks: Chunks, mean: Tensor, level: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The centred rows' factor R and Qᵀy, some rows at a time: its condition is not squared, as that of RᵀR is."""
    factor = torch.zeros(0, len(mean) + 1, dtype=torch.float64)
    for inputs, outputs, root in _doubles(chunks):
        rows = torch.cat([(inputs - mean) * scale, (outputs - level)[:, None]], dim=1) * root[:, None]
        factor = torch.linalg.qr(torch.cat([factor, rows]), mode="r").R
    return factor[:-1, :-1], factor[:-1, -1]


def _by_singular_values(system: Tensor, response: Tensor, size: int) -> Tensor:
    """The shortest solution, as numpy's.

    Not by QR with pivoting: torch hands LAPACK's gelsy pivots that it has not set, and its solution is one by chance.
    """
    rounding = torch.finfo(torch.float64).eps * size
    solution: Tensor = torch.linalg.lstsq(system, response, rcond=rounding, driver="gelsd").solution
    return solution


def _spectrum(matrix: Tensor) -> Spectrum:
    """Eigenvalues in ascending order and eigenvectors; of a matrix that is too large, the largest two."""
    if len(matrix) <= MOST_CURVATURES:
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
        return eigenvalues, eigenvectors
    log.warning(
        "Of %d curvatures only the largest are computed, so the verdict does without the closed form.", len(matrix)
    )
    start = torch.randn(len(matrix), 2, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    eigenvalues, eigenvectors = torch.lobpcg(matrix, X=start, largest=True)
    return eigenvalues.flip(0), eigenvectors.flip(1)


def _doubles(chunks: Chunks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields features, target and the weight's square root in float64, some rows at a time."""
    for chunk in chunks():
        inputs, outputs, *weight = (each.detach().cpu().double() for each in chunk)
        yield inputs, outputs, weight[0].sqrt() if weight else torch.ones_like(outputs)
