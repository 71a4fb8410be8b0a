"""One bar for the whole run: epoch, steps, loss and gradient norm."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from torch.optim import Optimizer

from downslope.callbacks.verdict_monitor import VerdictMonitor
from downslope.gradients.norms import norms, total_norm
from downslope.steps.observer import Observer
from downslope.steps.optimizer_steps import num_steps


class Terminal(Console):
    """A console whose reader may go away: rich itself would leave the whole process with `SystemExit`."""

    def on_broken_pipe(self) -> None:
        """Raises what happened, to be dealt with where it happened."""
        raise BrokenPipeError("the reader has gone")


class Progress(Observer, ProgressBar):
    """Shows where the run is: a bar in a terminal, elsewhere a line of plain text now and then.

    It looks at the loss and the gradient only when it shows them, so that a step costs it one look at the clock.

    Args:
        every_n_seconds: Seconds between two pictures of the bar.
        line_every_n_seconds: Seconds between two lines where there is no terminal.
    """

    def __init__(self, every_n_seconds: float = 0.1, line_every_n_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self.line_every_n_seconds = line_every_n_seconds
        self._enabled = True
        self._bar: Bar | None = None

    def disable(self) -> None:
        """Shows nothing from now on; Lightning calls it on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows again."""
        self._enabled = True

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self.console = Terminal(stderr=True)
        self._seconds = self.every_n_seconds if self.console.is_terminal else self.line_every_n_seconds
        self._shown_at = time.monotonic()
        self._due = False
        self._loss = self._gradient_norm = float("nan")
        if self._enabled and self.console.is_terminal:
            columns = ("  {task.fields[epoch]}", "{task.fields[steps]}  {task.fields[state]}")
            self._bar = Bar(
                TextColumn(columns[0]), BarColumn(24), TextColumn(columns[1]), console=self.console, auto_refresh=False
            )
            self._task = self._bar.add_task("", total=num_steps(trainer), epoch="", steps="", state="")
            self._bar.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._due = self._enabled and time.monotonic() - self._shown_at >= self._seconds

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._due:
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            self._gradient_norm = float(total_norm(norms(gradients))) if gradients else float("nan")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due:
            loss = trainer.callback_metrics.get("train/loss", outputs["loss"] if outputs else None)
            self._loss = float("nan") if loss is None else float(loss)
            self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar:
            self._show(trainer)
        self.detach()  # before others print their last words

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
        super().on_exception(trainer, pl_module, exception)

    def detach(self) -> None:
        bar, self._bar = self._bar, None
        if bar:
            self.console.quiet = self.is_off  # a terminal that has gone gets its stdout and stderr back unseen
            bar.stop()

    def _show(self, trainer: Trainer) -> None:
        self._shown_at = time.monotonic()
        total = num_steps(trainer)
        epoch = f"epoch {min(trainer.current_epoch + 1, trainer.max_epochs or 0)}/{trainer.max_epochs}"
        steps = f"{trainer.global_step}/{total if total is not None else '?'} steps"
        state = "  ".join([f"loss {self._loss:.4g}", f"‖gradient‖ {self._gradient_norm:.4g}", *_verdict(trainer)])
        if self._bar:
            self._bar.update(self._task, completed=trainer.global_step, epoch=epoch, steps=steps, state=state)
            self._bar.refresh()
        else:
            self.console.print(f"  {epoch}  {steps}  {state}", highlight=False, soft_wrap=True)


def _verdict(trainer: Trainer) -> list[str]:
    """The word of whoever judges, as soon as there is one."""
    monitors = [each for each in trainer.callbacks if isinstance(each, VerdictMonitor)]  # type: ignore[attr-defined]
    return [monitor.verdict.word for monitor in monitors if monitor.verdict]
