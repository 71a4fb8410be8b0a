"""The descent as pictures, in the run's folder and in TensorBoard."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from downslope.callbacks.optimizer_steps import OptimizerStep, OptimizerSteps, check_frequency
from downslope.gradients.least_squares import LeastSquares
from downslope.gradients.quadratic import loss_along_gradient, plane_of
from downslope.pictures.loss_surface import draw_loss_surface
from downslope.pictures.step_along_gradient import draw_step_along_gradient
from downslope.pictures.style import pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

THINNING = 3  # odd: of a zig-zag's points every third still lie on both sides
PARAMETER_AXES = ("weight", "bias")
EIGENVECTOR_AXES = ("along the steepest direction", "along the flattest direction")


@runtime_checkable
class HasLeastSquares(Protocol):
    """A module whose training loss is an exact quadratic of its parameters: the weights, then the bias."""

    def least_squares(self) -> LeastSquares | None:
        """Returns the loss over all training rows in closed form; None where it is not known."""
        ...


class Pictures(Callback):
    """Draws `loss_surface.png` and `step_along_gradient.png`, at the end and every so often.

    The path lies over (weight, bias) where the model has these two, else over the plane of the Hessian's two extreme
    eigenvectors. Both pictures need the loss in closed form: of a module without `least_squares` nothing is drawn.
    Parameters are copied after each step, and never changed. A picture that fails is warned of, and training goes on.

    Args:
        folder: Where the PNG files go; a later one replaces the one before.
        every_n_steps: Optimizer steps between two drawings. Each takes a few tenths of a second.
        num_points: Of the path, at most: beyond it every third is kept.
    """

    def __init__(self, folder: str, every_n_steps: int = 1000, num_points: int = 900) -> None:
        check_frequency("every_n_steps", every_n_steps)
        if isinstance(num_points, bool) or not isinstance(num_points, int) or num_points < THINNING:
            raise ValueError(f"`num_points` must be a whole number of at least {THINNING}, got {num_points!r}.")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.num_points = num_points
        self._steps: OptimizerSteps | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        line = pl_module.least_squares() if isinstance(pl_module, HasLeastSquares) else None
        if line is None or not trainer.is_global_zero or len(trainer.optimizers) != 1:
            return
        self._line, self._parameters = line, list(pl_module.parameters())
        self._now = self._before = flat(self._parameters)
        self._path, self._stride = [self._now], 1
        self._first = self._num_steps = self._last_step = trainer.global_step
        self._steps = OptimizerSteps(trainer, after=self._after)

    def _after(self, step: OptimizerStep) -> None:
        now = flat(self._parameters)
        if not torch.isfinite(now).all():
            return
        self._num_steps = step.step + 1
        if not torch.equal(now, self._now):  # a FlightRecorder takes a diverged step back before it is seen here
            self._before, self._now, self._last_step = self._now, now, step.step
        if (self._num_steps - self._first) % self._stride == 0:
            self._path.append(now)
        if len(self._path) > self.num_points:
            self._path = self._path[::THINNING]
            self._stride *= THINNING

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._steps and self._num_steps > self._first and self._num_steps % self.every_n_steps == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps:
            self._draw(trainer)
            self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._steps:
            self._steps.detach()
            self._steps = None

    def _draw(self, trainer: Trainer) -> None:
        try:
            for name, figure in self.figures().items():
                self.folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(self.folder / f"{name}.png")
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_image(
                            f"pictures/{name}", pixels(figure), self._num_steps, dataformats="HWC"
                        )
        except Exception as error:  # a full disk, a foreign logger: pictures never end a training
            self._detach()
            log.warning("Pictures are off from here on: %s: %s", type(error).__name__, error)

    def figures(self) -> "dict[str, Figure]":
        """Returns the pictures of the run so far by name; no step along a gradient that is zero."""
        end = flat(self._parameters)  # a run that diverged may have taken back its last step
        plane = plane_of(self._line, torch.stack([*until(self._path, end), end]))
        labels = PARAMETER_AXES if len(end) == 2 else EIGENVECTOR_AXES
        figures = {"loss_surface": draw_loss_surface(plane, labels, self._num_steps - self._first)}
        if not torch.equal(self._before, self._line.parameters) and self._num_steps > self._first:
            parabola, rate = loss_along_gradient(self._line, self._before, self._now - self._before)
            figures["step_along_gradient"] = draw_step_along_gradient(parabola, rate, self._last_step)
        return figures


def flat(parameters: Sequence[Tensor]) -> Tensor:
    """Returns a copy of all parameters in a row, on the CPU in float64."""
    return torch.cat([parameter.detach().flatten() for parameter in parameters]).cpu().double()


def until(path: Sequence[Tensor], end: Tensor) -> Sequence[Tensor]:
    """Returns the points before the first that equals `end`; all of them where none does."""
    return next((path[:place] for place, point in enumerate(path) if torch.equal(point, end)), path)
