"""SIGINT and SIGTERM: at once where nothing can be lost, else at the next step that training can be gone on from."""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """Leaves with the shell's exit code of a signal: 130 for SIGINT, 143 for SIGTERM.

    Attributes:
        saved: Whether all that was trained is in a checkpoint; None where this process left at once, whatever the
            others do.
    """

    def __init__(self, number: int, saved: bool | None = None) -> None:
        super().__init__(128 + number)
        self.saved = saved


def exit_on_signals() -> None:
    """Leaves on a signal at once, without a traceback."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    for number in SIGNALS:
        signal.signal(number, leave)


class StopRequest:
    """Remembers the first signal for whoever stops at a good place; a second SIGINT leaves at once.

    Attributes:
        number: The signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, object] = {}

    def listen(self) -> None:
        """Takes the place of the handlers that are there; in the main thread alone, where Python allows it."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise Interrupted(number)
        self.number = self.number or number

    def forget(self) -> None:
        """Gives the handlers back their places, unless Lightning has, which comes before its callbacks' turn.

        Otherwise its own handler, which holds the whole Trainer, would stay for good.
        """
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._take:
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
