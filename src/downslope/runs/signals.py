"""SIGINT and SIGTERM: at once where nothing can be lost, else at the next step that training can be resumed from."""

import math
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 0.5  # seconds after a signal in which another one is the same
STOP_FILE = "DOWNSLOPE_STOP_FILE"  # where a sweep's jobs, in processes of their own, find the signal that it was sent


class Interrupted(SystemExit):
    """Leaves with the shell's exit code of a signal: 130 for SIGINT, 143 for SIGTERM.

    Attributes:
        saved: Whether all that was trained is in a checkpoint; None where this process left at once, whatever the
            others do.
    """

    def __init__(self, number: int, saved: bool | None = None) -> None:
        super().__init__(128 + number)
        self.saved = saved


class Echo:
    """Knows a signal that was there before: launchers, and `timeout`, pass on what every process has heard already."""

    came_at = -math.inf

    @classmethod
    def is_one(cls) -> bool:
        """Whether the signal that has just come is one; asked once for each."""
        now = time.monotonic()
        if now - cls.came_at < ECHO:
            return True
        cls.came_at = now
        return False


def exit_on_signals() -> None:
    """Leaves on a signal at once, without a traceback; a second one does not wait for what is still tidied up."""

    def leave(number: int, frame: FrameType | None) -> None:
        if not Echo.is_one():
            end_on_signals()
            raise Interrupted(number)

    for number in SIGNALS:
        signal.signal(number, leave)


def end_on_signals() -> None:
    """Dies of the next signal without a word, as a process does that never heard of any: nothing is left to lose."""

    def end(number: int, frame: FrameType | None) -> None:
        if not Echo.is_one():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, end)


def signal_from_the_sweep() -> int:
    """Returns the signal that the job's sweep passes on, 0 for none."""
    with suppress(KeyError, OSError, ValueError):
        return int(Path(os.environ[STOP_FILE]).read_text())
    return 0


def leave_interrupts_to_the_sweep() -> None:
    """Ignores Ctrl-C in a job's own process, while nothing can be saved: the sweep hears it too, and passes it on."""
    if STOP_FILE in os.environ and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class StopRequest:
    """Remembers the first signal for whoever stops at a good place; a second SIGINT leaves at once.

    What the sweep says is looked at every few `seconds`.
    """

    def __init__(self, seconds: float = 0.2) -> None:
        self._number = 0
        self._seconds = seconds
        self._looked_at = time.monotonic()
        self._before: dict[signal.Signals, object] = {}

    @property
    def number(self) -> int:
        """The signal that came, 0 for none."""
        if not self._number and STOP_FILE in os.environ and time.monotonic() - self._looked_at >= self._seconds:
            self._looked_at = time.monotonic()
            self._number = signal_from_the_sweep()
        return self._number

    def listen(self) -> None:
        """Takes the place of the handlers that are there; in the main thread alone, where Python allows it."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}

    def _take(self, number: int, frame: FrameType | None) -> None:
        is_echo = Echo.is_one()
        if self._number and number == signal.SIGINT and not is_echo:
            raise Interrupted(number)
        self._number = self._number or number

    def forget(self) -> None:
        """Gives the handlers back their places, unless Lightning has, which comes before its callbacks' turn.

        Otherwise its own handler, which holds the whole Trainer, would stay for good.
        """
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._take:
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
