"""Where a step can be read, and its loss had again without a trace."""

from downslope.steps.gradient_check import GradientReport, check
from downslope.steps.loss import HasLoss

__all__ = ["GradientReport", "HasLoss", "check"]
