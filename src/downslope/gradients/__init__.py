"""Pure maths over tensors: torch alone is imported here."""

from downslope.gradients.critical_learning_rate import critical_learning_rate
from downslope.gradients.curvature import Hessian, largest_eigenvalue
from downslope.gradients.least_squares import HasLeastSquares, LeastSquares, least_squares
from downslope.gradients.norms import norms
from downslope.gradients.outlook import Outlook, best_learning_rate, outlook

__all__ = [
    "HasLeastSquares",
    "Hessian",
    "LeastSquares",
    "Outlook",
    "best_learning_rate",
    "critical_learning_rate",
    "largest_eigenvalue",
    "least_squares",
    "norms",
    "outlook",
]
