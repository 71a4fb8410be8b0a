"""Observers: each watches one thing, under any Trainer and LightningModule, and changes no bit of a good run."""

from downslope.callbacks.checkpoints import Checkpoints
from downslope.callbacks.flight_recorder import DivergenceError, FlightRecorder
from downslope.callbacks.gradient_monitor import GradientMonitor
from downslope.callbacks.progress import Progress

__all__ = ["Checkpoints", "DivergenceError", "FlightRecorder", "GradientMonitor", "Progress"]
