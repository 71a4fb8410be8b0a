"""One function's gradient, four ways: symbolic, numeric, forward mode, reverse mode.

All four take a function of one vector and the place, and return the gradient there. What differs is what they
need, how exact they are and what they cost: `scripts/compare_derivatives.py` draws it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class MeanSquaredError:
    """The loss of a line, as a function of its parameters θ = (w, b): L(θ) = (1/N) Σᵢ (w·xᵢ + b − yᵢ)².

    Attributes:
        features: X, one row a sample; without columns the line is its bias alone.
        target: y, one value a row.

    Example:
        >>> loss = MeanSquaredError(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 5.0]))
        >>> loss(torch.tensor([2.0, 0.0]))  # predicts 2 and 4, and is off by 1 twice
        tensor(1.)
    """

    features: Float[Tensor, "num_rows num_features"]
    target: Float[Tensor, " num_rows"]

    @functools.cached_property
    def inputs(self) -> Float[Tensor, "num_rows num_parameters"]:
        """Z, the features and a column of ones: what the bias is multiplied by."""
        return torch.nn.functional.pad(self.features, (0, 1), value=1.0)

    def __call__(self, parameters: Float[Tensor, " num_parameters"]) -> Float[Tensor, ""]:
        """Returns the loss at `parameters`: the weights, then the bias."""
        return torch.nn.functional.mse_loss(self.inputs @ parameters, self.target)


def symbolic(function: Function, parameters: Float[Tensor, " num_parameters"]) -> Float[Tensor, " num_parameters"]:
    """Differentiates the formula with SymPy, then puts the numbers in.

    SymPy sees L = (1/N)(Zθ − y)ᵀ(Zθ − y), with matrices whose sizes are symbols too, and derives ∇L from it.
    So one derivation serves every size. Z is `MeanSquaredError.inputs`.

    Args:
        function: A `MeanSquaredError`: of any other function only the values are known, not the formula.
        parameters: θ, where the gradient is wanted.

    Returns:
        ∇L(θ), detached.

    Raises:
        ImportError: SymPy is not installed.
        TypeError: The function is not a `MeanSquaredError`.

    Example:
        >>> loss = MeanSquaredError(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 5.0]))
        >>> symbolic(loss, torch.tensor([2.0, 0.0]))  # residuals −1, −1: (2/2)·(−1·1 − 1·2), (2/2)·(−1 − 1)
        tensor([-3., -2.])
    """
    if not isinstance(function, MeanSquaredError):
        raise TypeError(
            f"Cannot differentiate {type(function).__name__} symbolically. This is because SymPy needs the "
            "formula, and a function gives only its values: pass a `MeanSquaredError`, or take another way."
        )
    num_rows = len(function.target)
    return _compiled_gradient()(function.inputs, parameters.detach()[:, None], function.target[:, None], num_rows)[:, 0]


@functools.cache
def symbolic_gradient() -> Any:
    """Returns the SymPy expression of ∇L for the mean squared error of a line, in the symbols Z, θ, y and N.

    Raises:
        ImportError: SymPy is not installed.

    Example:
        >>> symbolic_gradient()
        (2/N)*Z.T*(Z*θ - y)
    """
    return _symbols_and_gradient()[1]


@functools.cache
def _compiled_gradient() -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    from sympy import lambdify

    compiled: Callable[[Tensor, Tensor, Tensor, int], Tensor] = lambdify(*_symbols_and_gradient(), modules="torch")
    return compiled


def _symbols_and_gradient() -> tuple[tuple[Any, ...], Any]:
    try:
        import sympy
    except ImportError as error:
        raise ImportError(
            "Cannot differentiate symbolically. This is because SymPy is not installed: "
            "pip install 'downslope[symbolic]'"
        ) from error
    num_rows, num_parameters = sympy.symbols("N n", integer=True, positive=True)
    inputs = sympy.MatrixSymbol("Z", num_rows, num_parameters)
    parameters = sympy.MatrixSymbol("θ", num_parameters, 1)
    target = sympy.MatrixSymbol("y", num_rows, 1)
    residual = inputs * parameters - target
    loss = residual.T * residual / num_rows
    return (inputs, parameters, target, num_rows), loss.diff(parameters).doit()


def numeric(
    function: Function, parameters: Float[Tensor, " num_parameters"], step: float | None = None
) -> Float[Tensor, " num_parameters"]:
    """Takes central differences: two evaluations a parameter, and nothing known but the function's values.

    ∂L/∂θᵢ ≈ (L(θ + hᵢeᵢ) − L(θ − hᵢeᵢ)) / (2hᵢ), with hᵢ = step · max(1, |θᵢ|).

    Two errors pull at the step. Truncation, what Taylor's series leaves out, is |L‴|h²/6; rounding, of two
    nearly equal values of L, is about ε|L|/h. With |L| and |L‴| of like size their sum is least near h =
    ε^(1/3), where it is about ε^(2/3): of float32's 7 digits 5 are right, of float64's 16 there are 10.

    Args:
        function: Maps a vector to a number.
        parameters: θ, where the gradient is wanted.
        step: Relative step; ε^(1/3) of the parameters' precision when None.

    Returns:
        Approximately ∇L(θ), detached.

    Example:
        >>> numeric(lambda parameters: (parameters**2).sum(), torch.tensor([1.0, -3.0], dtype=torch.float64))
        tensor([ 2.0000, -6.0000], dtype=torch.float64)

    Reference: Press et al. (2007), Numerical Recipes, section 5.7.
    """
    if step is None:
        step = best_step(parameters.dtype)
    center = parameters.detach()
    shifted, gradient = center.clone(), torch.empty_like(center)
    for index, value in enumerate(center):
        width = step * value.abs().clamp(min=1.0)
        # The step that is taken is the one that the number format can represent.
        above, below = value + width, value - width
        shifted[index] = above
        difference = function(shifted)
        shifted[index] = below
        difference = difference - function(shifted)
        gradient[index] = difference / (above - below)
        shifted[index] = value
    return gradient


def best_step(dtype: torch.dtype) -> float:
    """Returns ε^(1/3), the relative step at which central differences err least; see `numeric`.

    Example:
        >>> round(best_step(torch.float32), 4), round(best_step(torch.float64), 7)
        (0.0049, 6.1e-06)
    """
    return float(torch.finfo(dtype).eps ** (1 / 3))


def forward_mode(function: Function, parameters: Float[Tensor, " num_parameters"]) -> Float[Tensor, " num_parameters"]:
    """Carries a derivative along with each value, from the parameters to the loss: one pass a parameter.

    A dual number is v + v̇ϵ with ϵ² = 0. Evaluated at θ + eᵢϵ, the function returns L(θ) + (∂L/∂θᵢ)ϵ, exact
    to rounding. `torch.func.jvp` computes the pair.

    Args:
        function: Maps a vector to a number.
        parameters: θ, where the gradient is wanted.

    Returns:
        ∇L(θ), detached.

    Example:
        >>> forward_mode(lambda parameters: (parameters**2).sum(), torch.tensor([1.0, -3.0]))
        tensor([ 2., -6.])

    Reference: Griewank and Walther (2008), Evaluating Derivatives, section 3.1.
    """
    center = parameters.detach()
    direction, gradient = torch.zeros_like(center), torch.empty_like(center)
    for index in range(len(center)):
        direction[index] = 1.0
        gradient[index] = torch.func.jvp(function, (center,), (direction,))[1]
        direction[index] = 0.0
    return gradient


def reverse_mode(function: Function, parameters: Float[Tensor, " num_parameters"]) -> Float[Tensor, " num_parameters"]:
    """Records the evaluation, and walks it back from the loss to the parameters: one pass for all of them.

    The gradient costs a small multiple of the function, however many parameters there are (at most five
    times, in operations), which is why `backward()` works like this. The price is memory: the record.

    Args:
        function: Maps a vector to a number.
        parameters: θ, where the gradient is wanted.

    Returns:
        ∇L(θ), detached.

    Example:
        >>> reverse_mode(lambda parameters: (parameters**2).sum(), torch.tensor([1.0, -3.0]))
        tensor([ 2., -6.])

    Reference: Griewank and Walther (2008), Evaluating Derivatives, section 3.2.
    """
    leaf = parameters.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


METHODS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "symbolic": symbolic,
    "numeric": numeric,
    "forward mode": forward_mode,
    "reverse mode": reverse_mode,
}
