"""Curvature: products with the Hessian of a loss, and its largest eigenvalue, which limits the learning rate."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

EXPLORATION = 1e-3  # share of a random direction in a start: the way out of an eigenvector that is not the first


class Hessian:
    """The Hessian H = ∂²L/∂θ² of a loss, to multiply with: it is never formed.

    Hv = ∂(gᵀv)/∂θ with g = ∂L/∂θ, normalised as the loss is (1/N where that is a mean). θ are the elements of the
    parameters in their order, as one vector: a parameter that requires no gradient is left out, one that is listed
    twice (tied) counts once, and one that the loss does not depend on has rows of zeros.

    The gradient and its graph are made here, once; each product is one more backward pass. No `.grad` is touched.

    Args:
        loss: L, with its graph.
        parameters: Dense, on one device.

    Attributes:
        num_rows: Elements of θ.

    Raises:
        ValueError: No parameter requires a gradient, a gradient is sparse, or cannot be derived again.

    Example:
        L = a²b has H = [[2b, 2a], [2a, 0]]:

        >>> a, b = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
        >>> hessian = Hessian(a**2 * b, [a, b])
        >>> hessian.product(torch.tensor([1.0, 0.0])), hessian.product(torch.tensor([0.0, 1.0]))
        (tensor([10.,  6.]), tensor([6., 0.]))

    Reference: Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """

    def __init__(self, loss: Float[Tensor, ""], parameters: Iterable[Float[Tensor, "..."]]) -> None:
        self._theta = list(dict.fromkeys(parameter for parameter in parameters if parameter.requires_grad))
        if not self._theta:
            raise ValueError("Cannot take the Hessian. This is because no parameter requires a gradient.")
        self._sizes = [parameter.numel() for parameter in self._theta]
        self.num_rows = sum(self._sizes)
        gradients = (
            torch.autograd.grad(loss, self._theta, create_graph=True, allow_unused=True)
            if loss.requires_grad
            else [None] * len(self._theta)
        )
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            raise ValueError("Cannot take the Hessian. This is because a gradient is sparse: use `sparse=False`.")
        if _ends_early(gradients):
            raise ValueError(
                "Cannot take the Hessian. This is because a function in the loss is `once_differentiable`."
            )
        # Where the gradient is constant it has no graph, and the Hessian no entry.
        self._gradients = {
            index: gradient
            for index, gradient in enumerate(gradients)
            if gradient is not None and gradient.requires_grad
        }

    def product(self, vector: Float[Tensor, " num_rows"]) -> Float[Tensor, " num_rows"]:
        """Returns Hv, detached, in the precision of v."""
        if not self._gradients:
            return torch.zeros_like(vector)
        pieces = vector.split(self._sizes)
        rows = torch.autograd.grad(
            list(self._gradients.values()),
            self._theta,
            grad_outputs=[pieces[index].view_as(gradient).to(gradient) for index, gradient in self._gradients.items()],
            retain_graph=True,
            allow_unused=True,
        )
        return torch.cat(
            [
                torch.zeros_like(piece) if row is None else row.flatten().to(piece)
                for row, piece in zip(rows, pieces, strict=True)
            ]
        )

    def random_direction(self) -> Float[Tensor, " num_rows"]:
        """Returns a vector to multiply with: the same one each time, and at least float32 for its rounding."""
        dtype = torch.float32
        for parameter in self._theta:
            dtype = torch.promote_types(dtype, parameter.dtype)
        return _random(torch.empty(self.num_rows, dtype=dtype, device=self._theta[0].device))


def _ends_early(gradients: Iterable[Tensor | None]) -> bool:
    """Whether the graph of a gradient is cut off by a function that PyTorch would pass over without an error."""
    nodes = {gradient.grad_fn for gradient in gradients if gradient is not None}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        new = {following for following, _ in node.next_functions} - nodes
        nodes |= new
        waiting += new
    return False


@dataclass(frozen=True, eq=False)
class Eigenpair:
    """An eigenvalue of a symmetric matrix H and its eigenvector, as far as they are known.

    Attributes:
        value: θ; NaN where a product was not finite.
        vector: x, of length 1, detached.
        residual: ‖Hx − θx‖: some eigenvalue of H is at most so far from θ.
        num_products: Products with H that it took.
    """

    value: float
    vector: Float[Tensor, " num_rows"]
    residual: float
    num_products: int


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Float[Tensor, " num_rows"], num_products: int
) -> Eigenpair:
    """Returns the algebraically largest eigenvalue of a symmetric matrix, by the method of Lanczos.

    θ = max xᵀHx over the unit vectors x of span(v, Hv, H²v, …), which is never above the largest eigenvalue. Where
    negative curvature dominates (eigenvalues −5 and 1) it is the largest that is returned (1), not the one of largest
    magnitude, which power iteration would find.

    Lanczos because each product counts: on MLPs ten of them left a relative error of 2e-7 and less, where ten of power
    iteration left 1e-3 … 1e-6, and close eigenvalues make that stall.

    Args:
        product: v ↦ Hv.
        start: v, other than zero: random, or the eigenvector of a similar matrix.
        num_products: At most so many products are taken; with as many as H has rows the result is exact.

    Returns:
        The eigenpair; its residual says how far the method came.

    Example:
        >>> matrix = torch.diag(torch.tensor([-5.0, 1.0, 0.5]))
        >>> round(largest_eigenvalue(lambda v: matrix @ v, torch.ones(3), num_products=3).value, 5)
        1.0

    Reference: Golub and Van Loan (2013), Matrix Computations, section 10.1 and, for the orthogonalisation, 10.3.
    """
    num_products = min(num_products, len(start))
    random = _random(start)
    vector = _unit(start) + EXPLORATION * _unit(random)
    directions = start.new_empty(num_products, len(start))
    diagonal: list[float] = []
    couplings: list[float] = []
    for index in range(num_products):
        directions[index] = _unit(vector)
        basis = directions[: index + 1]
        image = product(basis[-1])
        diagonal.append(float(image @ basis[-1]))
        vector = _orthogonal(image, basis)
        couplings.append(float(vector.norm()))
        if not math.isfinite(diagonal[-1] + couplings[-1]):
            return Eigenpair(math.nan, _unit(start), math.nan, len(diagonal))
        # What is left is rounding: the directions so far are complete, and another eigenvalue may lie outside them.
        if couplings[-1] <= 100 * torch.finfo(start.dtype).eps * max(map(abs, diagonal + couplings)):
            couplings[-1] = 0.0
            random = random.roll(1)
            vector = _orthogonal(random, basis)
    return _largest(directions, diagonal, couplings)


def _largest(basis: Tensor, diagonal: Sequence[float], couplings: Sequence[float]) -> Eigenpair:
    """The largest eigenpair of H within the basis, where H is tridiagonal; the last coupling leads out of it."""
    offdiagonal = torch.tensor(couplings[:-1], dtype=torch.float64)
    tridiagonal = torch.tensor(diagonal, dtype=torch.float64).diag() + offdiagonal.diag(1) + offdiagonal.diag(-1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    coordinates = vectors[:, -1]
    residual = couplings[-1] * abs(float(coordinates[-1]))
    return Eigenpair(float(values[-1]), _unit(coordinates.to(basis) @ basis), residual, len(diagonal))


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """Without its part in the rows of the basis; once is not enough where little remains."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return unit


def _random(like: Tensor) -> Tensor:
    """A direction drawn by a generator of its own: training's random numbers stay as they are."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.empty_like(like).uniform_(-1.0, 1.0, generator=generator)
