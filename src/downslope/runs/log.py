"""The log of a run: everything in a file, our own warnings in the terminal, and what is said before there is a log."""

import contextlib
import errno
import logging
import sys
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what a disk says that takes no more
_early: list[logging.LogRecord] = []


class LogFile(logging.FileHandler):
    """The log of a run: where it cannot be written, training goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Says it, and closes the file's door."""
        self.addFilter(lambda _: False)
        logging.getLogger(__name__).warning("Cannot write %s any more: %s", self.baseFilename, sys.exception())


class Quiet(logging.Filter):
    """Lets our own warnings through to the terminal, and everything when Hydra was told to be verbose.

    That a disk cannot be written is said once a run, by whoever finds it first: loggers, pictures, checkpoints, the
    log. What is lost for good, a result or the last checkpoint, is an error at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._has_told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Tells whether the terminal shows the record."""
        verbose = logging.getLogger().level <= logging.DEBUG
        ours = record.name.startswith("downslope") and record.levelno >= logging.WARNING
        return verbose or (ours and not self._is_told(record))

    def _is_told(self, record: logging.LogRecord) -> bool:
        """Tells whether the record says of the disk what another one has said; adds to the first that it is one."""
        values = record.args if isinstance(record.args, tuple) else ()
        told, full = self._has_told, any(isinstance(each, OSError) and each.errno in FULL for each in values)
        if full and not told:
            record.msg = f"{record.msg} (said once a run: other files may not be written either)"
            self._has_told = True
        return full and told


class _Early(logging.Handler):
    """Keeps what is said, for the log that comes."""

    def emit(self, record: logging.LogRecord) -> None:
        _early.append(record)


@contextlib.contextmanager
def early_log() -> Iterator[None]:
    """Keeps what is said before logging is configured: nothing of it lands in the terminal yet."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [_Early()]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    _early.clear()
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(level)


def forget_early_log() -> None:
    """Drops it: what was built has only been checked."""
    _early.clear()


def hear_lightning() -> None:
    """Lets Lightning's messages go where all others go; once imported it prints them for itself."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def begin_log() -> None:
    """Says in the run's log what was said early; from now on Lightning and `warnings` speak there too."""
    hear_lightning()
    logging.captureWarnings(True)
    while _early:
        record = _early.pop(0)
        logging.getLogger(record.name).handle(record)
