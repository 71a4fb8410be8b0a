"""Observers: each watches one thing, under any Trainer and LightningModule, and changes no bit of a good run."""

from downslope.callbacks.checkpoints import Checkpoints
from downslope.callbacks.critical_learning_rate import CriticalLearningRate
from downslope.callbacks.flight_recorder import DivergenceError, FlightRecorder
from downslope.callbacks.gradient_check import GradientCheck
from downslope.callbacks.gradient_monitor import GradientMonitor
from downslope.callbacks.learning_rate_effects import LearningRateEffects
from downslope.callbacks.pictures import Pictures
from downslope.callbacks.progress import Progress
from downslope.callbacks.sharpness_monitor import SharpnessMonitor
from downslope.callbacks.verdict_monitor import VerdictMonitor

__all__ = [
    "Checkpoints",
    "CriticalLearningRate",
    "DivergenceError",
    "FlightRecorder",
    "GradientCheck",
    "GradientMonitor",
    "LearningRateEffects",
    "Pictures",
    "Progress",
    "SharpnessMonitor",
    "VerdictMonitor",
]
