"""A callback that stops a real run at a known place, and says so, until the test has done its worst."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver


class Witness(Callback):
    """Waits in the main process after an optimizer step and, if asked to, in the middle of a checkpoint.

    Args:
        folder: Where it says `step` and `write` when it is there, and waits for `step.go` and `write.go`; where every
            process that is stopped leaves its step, as `stopped-<rank>`.
        step: The step after which it waits.
        write: Whether it also waits in the next file that is written after it, before that is flushed.
    """

    def __init__(self, folder: str, step: int, write: bool = False) -> None:
        self.folder, self.step, self.write = Path(folder), step, write
        _ChildProcessObserver.__init__.__defaults__ = (0.05,)  # seconds between two looks: else five

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        reached = trainer.global_step == self.step and trainer.is_global_zero
        if reached and not (self.folder / "step").exists():  # once: not when the run is gone on with
            if self.write:
                os.fsync = self._fsync(os.fsync)
            self._wait("step")

    def _fsync(self, flush: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(handle: int) -> None:
            os.fsync = flush
            os.ftruncate(handle, os.fstat(handle).st_size // 2)  # what a kill leaves
            self._wait("write")
            flush(handle)

        return fsync

    def _wait(self, place: str) -> None:
        (self.folder / place).touch()
        end = time.monotonic() + 120
        while not (self.folder / f"{place}.go").exists() and time.monotonic() < end:
            time.sleep(0.01)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        (self.folder / f"stopped-{trainer.global_rank}").write_text(str(trainer.global_step))
        if trainer.world_size > 1 and trainer.is_global_zero:
            time.sleep(1)  # the last to leave, as one that has much to write


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for a condition, for so long at most."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
