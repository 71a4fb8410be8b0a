"""A file is there whole or not at all: whatever stops the writing, what stood there before still does."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # ends the name of what is being written


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """Opens a file to be written beside its name, on the same file system; flushed to the disk, it takes the name.

    Its folder must be there: one that was moved away meanwhile is not made anew.

    Raises:
        OSError: The disk is full, or something else is in the way; what was at `file` is still there.
    """
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PARTIAL}")  # no name that a link could wait at
    try:
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:  # a second SIGINT too
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if os.name == "posix":  # so that the renaming, too, lasts through a power cut
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
