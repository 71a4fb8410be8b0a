"""The log of a run: everything in a file, our own warnings in the terminal, and what is said before there is a log."""

import contextlib
import errno
import logging
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from logging.handlers import MemoryHandler

from downslope.runs.plain_files import open_regular, printable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE)  # nothing more is written
GONE = (errno.EACCES, errno.ENOENT)  # nor where the folder has become read-only, or was moved away
OTHERS = ("lightning", "torch", "py", "hydra", "matplotlib", "fsspec", "submitit", "ray")  # "py.warnings": `warnings`
_early = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize)


class LogFile(logging.FileHandler):
    """The log of a run: where it cannot be written, training continues."""

    def _open(self) -> TextIOWrapper:
        """Follows no link: the file may have been there before."""
        return open(self.baseFilename, self.mode, encoding="utf-8", opener=open_regular)  # type: ignore[return-value]

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Says it, and closes the file's door."""
        self.addFilter(lambda _: False)
        logging.getLogger(__name__).warning("Cannot write %s any more: %s", self.baseFilename, sys.exception())


class Printable(logging.Formatter):
    """Shows of what came from a run's folder nothing that steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return str(printable(super().format(record)))


class Quiet(logging.Filter):
    """Lets our own and your warnings through to the terminal, and everything when Hydra was told to be verbose.

    That a disk cannot be written is said once a run, by whoever finds it first: loggers, pictures, checkpoints, the
    log. What is lost for good, a result or the last checkpoint, is an error at the end.
    """

    _has_told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Tells whether the terminal shows the record."""
        if logging.getLogger().level <= logging.DEBUG:
            return True
        if record.name.partition(".")[0] in OTHERS or record.levelno < logging.WARNING:
            return False
        values = record.args if isinstance(record.args, tuple) else ()
        if not any(isinstance(value, OSError) and value.errno in (*FULL, *GONE) for value in values):
            return True
        first, self._has_told = not self._has_told, True
        if first:
            record.msg = f"{record.msg} (said once per run: other files may not be written either)"
        return first


@contextlib.contextmanager
def early_log() -> Iterator[None]:
    """Keeps what is said before logging is configured: nothing of it lands in the terminal yet."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [_early]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    _early.buffer.clear()
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(level)


def forget_early_log() -> None:
    """Drops it: what was built has only been checked."""
    _early.buffer.clear()


def hear_lightning() -> None:
    """Lets Lightning's messages go where all others go; once imported it prints them for itself."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def begin_log() -> None:
    """Says in the run's log what was said early; from now on Lightning and `warnings` speak there too."""
    hear_lightning()
    logging.captureWarnings(True)
    records, _early.buffer = _early.buffer, []
    for record in records:
        logging.getLogger(record.name).handle(record)
