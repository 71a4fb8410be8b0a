"""The descent as pictures, in the run's folder and in TensorBoard."""

import logging
from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from downslope.gradients.least_squares import HasLeastSquares, LeastSquares
from downslope.gradients.quadratic import loss_along_gradient, plane_of
from downslope.gradients.vectors import clones
from downslope.logs.tensorboard import write_picture
from downslope.pictures.loss_surface import draw_loss_surface
from downslope.pictures.step_along_gradient import draw_step_along_gradient
from downslope.pictures.style import QUIET, png
from downslope.steps.batch_step import BatchStep
from downslope.steps.due import check_count
from downslope.steps.loss import BatchLoss, Loss, check_loss, said_off, why_no_loss_of_a_step
from downslope.steps.observer import Observer
from downslope.steps.optimizer_steps import OptimizerStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Place = Sequence[Tensor]  # all parameters at one moment, each in its own shape, type and device

ROUNDING = 1e-14  # of a float32's square
PATH_BYTES = 64 * 2**20
THINNING = 3  # odd: of a zig-zag's points every third still lie on both sides
PARAMETER_AXES = ("weight", "bias")
EIGENVECTOR_AXES = ("along the steepest direction", "along the flattest direction")


class Pictures(Observer):
    """Draws `loss_surface_<run>.png` and `step_along_gradient_<run>.png`, at the end and every so often.

    The path lies over (weight, bias) where the model has these two, else over the plane of the Hessian's two extreme
    eigenvectors: that needs the loss in closed form, `least_squares()`. Before each step the parameters are copied
    where they are, in one fused call and without a wait for the device; all arithmetic is left to the drawing.

    A step is drawn on the loss of its batch, along that batch's gradient, by some thirty forwards at each drawing; only
    the steps to be drawn, and the last of each epoch, are copied. A line's step that followed all rows, or whose batch
    was not kept, is drawn on the closed form. Of any other module the log says why the loss cannot be had.
    A picture that fails is warned of, and training continues.

    `<run>` is the name of the folder and the rate; it stands in a corner of each picture, too.

    Args:
        folder: Where the PNG files go; a later one replaces the one before.
        every_n_steps: Optimizer steps between two drawings. Each takes a few tenths of a second; TensorBoard is shown
            the first, second, fourth, eighth, …, and the last.
        num_points: Of the path, at most: beyond it every third is kept. Wide models keep fewer, 64 MiB in all.
        loss: As for `downslope.steps.loss.BatchLoss`.
    """

    def __init__(self, folder: str, every_n_steps: int = 1000, num_points: int = 900, loss: Loss | None = None) -> None:
        check_loss(loss)
        check_count("every_n_steps", every_n_steps)
        check_count("num_points", num_points, least=THINNING)
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.num_points = num_points
        self.loss = loss
        self._is_drawing = False

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self.listen_only()
        self._is_drawing = False
        self._told: set[str] = set()
        self._line = module.least_squares() if isinstance(module, HasLeastSquares) else None
        self._batch_step: BatchStep | None = None
        reason = why_no_loss_of_a_step(trainer, module, self.loss)
        is_off = self._line is None and said_off(trainer, "pictures/step_along_gradient", reason)
        follows_all_rows = trainer.num_training_batches == 1 and trainer.limit_train_batches == 1.0
        self._is_of_a_batch = not reason and not (self._line and follows_all_rows)
        if is_off or len(trainer.optimizers) != 1 or not trainer.is_global_zero:
            return
        self._parameters = [parameter.detach() for parameter in module.parameters()]
        self._path: list[Place] = []
        self._stride = 1
        self._most = max(THINNING, min(self.num_points, PATH_BYTES // sum(each.nbytes for each in self._parameters)))
        self._last_two: deque[Place] = deque(maxlen=2)
        self._first = self._num_steps = self._drawn_at = self._shown_at = trainer.global_step
        self.folder.mkdir(parents=True, exist_ok=True)
        groups = trainer.optimizers[0].param_groups
        rate = next((group.get("initial_lr", group["lr"]) for group in groups if "lr" in group), None)
        is_told = rate is None or "lr=" in self.folder.name
        self._run = self.folder.name if is_told else f"{self.folder.name}_lr={rate:g}".removeprefix("_")
        self.follow(trainer, before=self._before)
        self._is_drawing = True
        self.listen("on_train_batch_start", when=self._is_of_a_batch)

    def _before(self, step: OptimizerStep) -> None:
        self._num_steps = step.step + 1
        self.listen("on_train_batch_end", when=self._num_steps % self.every_n_steps == 0 or self._is_of_a_batch)
        if self._line is None:
            return
        place = clones(self._parameters)
        self._last_two.append(place)
        if (step.step - self._first) % self._stride == 0:
            self._path.append(place)
        if len(self._path) > self._most:
            self._path = self._path[::THINNING]
            self._stride *= THINNING

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        coming = self._num_steps + 1
        is_last = trainer.is_last_batch and (self._line is None or trainer.current_epoch + 1 == trainer.max_epochs)
        if coming % self.every_n_steps == 0 or coming == trainer.max_steps or is_last:
            loss = BatchLoss(pl_module, batch, self.loss, batch_idx, precise=True)
            self._batch_step = BatchStep(self._num_steps, loss)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._batch_step:
            self._batch_step.ends()
        if self._num_steps % self.every_n_steps == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_drawing:
            self._draw(trainer, last=True)

    def _draw(self, trainer: Trainer, last: bool = False) -> None:
        if self._num_steps == (self._shown_at if last else self._drawn_at):  # batches of one step, or no step at all
            return
        drawing = self._num_steps // self.every_n_steps
        shown = last or not drawing & (drawing - 1)  # the 1st, 2nd, 4th, 8th, …: else a long run's events are pictures
        self._drawn_at = self._num_steps
        self._shown_at = self._num_steps if shown else self._shown_at
        for name, figure in self.figures().items():
            figure.text(0.99, 0.015, self._run, color=QUIET, fontsize=8, ha="right")
            picture = png(figure)  # drawn and packed once, for all who show it
            (self.folder / f"{name}_{self._run}.png").write_bytes(picture)
            if shown:
                write_picture(trainer, f"pictures/{name}", picture, self._num_steps)

    def figures(self) -> "dict[str, Figure]":
        """Returns the pictures of the run so far by name; the log says why one is left out."""
        figures: dict[str, Figure] = {}
        try:
            if self._line is None:
                figures["step_along_gradient"] = self._step_on_the_batch()
            else:
                end = flat(self._parameters)  # a run that diverged may have taken back its last step
                figures["loss_surface"] = self._surface(self._line, end)
                is_kept = self._batch_step and self._batch_step.step == self._num_steps - 1
                step = self._step_on_the_batch() if is_kept else self._step_on_the_line(self._line, end)
                figures["step_along_gradient"] = step
        except ValueError as error:
            reason = str(error)  # who keeps log records shall not keep a traceback, and with it the run
            if reason not in self._told:
                log.warning("pictures/step_along_gradient is left out. This is because %s.", reason)
            self._told.add(reason)
        return figures

    def _surface(self, line: LeastSquares, end: Tensor) -> "Figure":
        points = takewhile(lambda point: not torch.equal(point, end), map(flat, self._path))
        path = torch.stack([*points, end])
        finite = path.isfinite().all(dim=1)
        labels = PARAMETER_AXES if len(end) == 2 else EIGENVECTOR_AXES
        num_steps = self._num_steps - self._first if finite[-1] else (int(finite.sum()) - 1) * self._stride
        return draw_loss_surface(plane_of(line, path[finite]), labels, num_steps)

    def _step_on_the_batch(self) -> "Figure":
        if self._batch_step is None:
            raise ValueError("training ended within its first epoch")
        with self._batch_step.loss.measuring():
            profile, rate = self._batch_step.profile()
            return draw_step_along_gradient(profile, rate, self._batch_step.step)

    def _step_on_the_line(self, line: LeastSquares, end: Tensor) -> "Figure":
        """Draws the last step that still stands: a FlightRecorder takes back one that diverged."""
        last_two = [flat(place) for place in self._last_two]
        taken_back = torch.equal(last_two[-1], end) and len(last_two) == 2
        if not taken_back and any(torch.equal(flat(place), end) for place in self._path):
            raise ValueError("the last two steps have been undone")
        before = last_two[-2 if taken_back else -1]
        if not (before.isfinite().all() and end.isfinite().all()):
            raise ValueError("the parameters are not finite")
        parabola, rate = loss_along_gradient(line, before, end - before)
        if parabola(0.0) - parabola(parabola.best) <= ROUNDING * parabola(0.0):
            raise ValueError("the loss along the gradient is flat to within rounding")
        step = self._num_steps - (2 if taken_back else 1)
        return draw_step_along_gradient(parabola, rate, step, line.largest_stable_learning_rate)


def flat(parameters: Place) -> Tensor:
    """Returns a copy of all parameters in a row, on the CPU in float64."""
    return torch.cat([parameter.flatten().cpu().double() for parameter in parameters])
