"""Data: a table of numbers, split, standardised, and served in batches from memory."""

from downslope.data.datamodule import DataModule

__all__ = ["DataModule"]
