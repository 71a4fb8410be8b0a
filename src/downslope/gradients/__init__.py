"""Pure maths over tensors: neither Lightning nor Hydra is imported here."""

from downslope.steps.gradient_check import GradientReport, check

__all__ = ["GradientReport", "check"]
