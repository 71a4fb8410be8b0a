"""Models: a line under the mean squared error, trained by Lightning or by hand."""

from downslope.models.automatic import AutomaticLinearRegression
from downslope.models.manual import ManualLinearRegression

__all__ = ["AutomaticLinearRegression", "ManualLinearRegression"]
