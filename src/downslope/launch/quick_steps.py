"""What Lightning does at every step and nobody asked for, left out by public means."""

import inspect
from contextlib import AbstractContextManager, nullcontext

from lightning import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

NOTHING = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Profiles nothing, as the one it replaces, which enters and leaves a generator 30 times a step to do so."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]  # nor is it a generator's
        """Returns a context that does nothing."""
        return NOTHING


def quicken(trainer: Trainer, module: LightningModule) -> None:
    """Takes a twentieth off the smallest step: what is computed stays the same."""
    if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]  # a connector sets it
        trainer.profiler = NoProfiler()  # type: ignore[attr-defined]  # the same
    step = type(module).training_step
    if inspect.isfunction(step):  # Lightning asks for its signature at every step: so it finds it made
        step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # as PEP 362 has it
