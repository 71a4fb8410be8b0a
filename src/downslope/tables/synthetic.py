"""A linear problem with a known answer and a chosen difficulty."""

from dataclasses import dataclass

import numpy as np

from downslope.tables.columns import Array
from downslope.tables.randomness import Stream, generator
from downslope.tables.table import Table


@dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticTable(Table):
    """A table whose true line is known: target = features @ weights + bias + noise."""

    weights: Array
    bias: float


def synthetic_table(
    num_rows: int, num_features: int, noise: float, condition_number: float, seed: int
) -> SyntheticTable:
    """Draws features of an exact condition number, and a target on a known line plus noise.

    The features X (N rows) have mean 0 and the second-moment matrix XᵀX/N = V diag(s) Vᵀ, with V a random
    rotation and s falling geometrically from 1 to 1/condition_number. So the mean squared error's Hessian,
    (2/N)XᵀX beside the bias's 2, has largest eigenvalue 2 whatever the condition number: the largest stable
    learning rate is 1.

    Args:
        num_rows: N, greater than `num_features`.
        num_features: At least 1.
        noise: Standard deviation of the Gaussian noise on the target.
        condition_number: Largest over smallest eigenvalue of XᵀX/N; 1 or more.
        seed: Same seed, same table.

    Raises:
        ValueError: A number is out of its range.
    """
    if num_features < 1:
        raise ValueError(f"`num_features` must be a whole number of at least 1, got {num_features}.")
    if num_rows <= num_features + 1:
        raise ValueError(
            f"`num_rows` must be at least {num_features + 2} with {num_features} features, got {num_rows}. "
            "This is because fewer rows leave some direction of the weights undetermined."
        )
    if not 0 <= noise < np.inf:
        raise ValueError(f"`noise` must be a finite number of at least 0, got {noise}.")
    if not 1 <= condition_number <= 1e12:
        raise ValueError(f"`condition_number` must be between 1 and 1e12, got {condition_number}.")
    random = generator(Stream.SYNTHETIC, seed)
    directions = random.standard_normal((num_rows, num_features))
    directions -= directions.mean(axis=0)
    # Cholesky whitening costs N·d² like QR, without a second copy of N rows.
    factor = np.linalg.cholesky(directions.T @ directions / num_rows)
    rotation, _ = np.linalg.qr(random.standard_normal((num_features, num_features)))
    eigenvalues = np.geomspace(1.0, 1.0 / condition_number, num_features)
    features = directions @ np.linalg.solve(factor.T, np.sqrt(eigenvalues)[:, None] * rotation.T)
    weights, bias = random.standard_normal(num_features), float(random.standard_normal())
    target = features @ weights + bias + noise * random.standard_normal(num_rows)
    names = tuple(f"x{index}" for index in range(1, num_features + 1))
    return SyntheticTable("synthetic", features, target, names, "y", weights=weights, bias=bias)
