"""A run's checkpoints: plain tensors and plain data, written whole or not at all, and read as nothing else."""

import hashlib
import io
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from downslope.runs.whole_files import PARTIAL, whole_file

log = logging.getLogger(__name__)

BEST = "checkpoints/best.ckpt"
LAST = "checkpoints/last.ckpt"
PREVIOUS = "checkpoints/previous.ckpt"
CHECKSUM = b"downslope sha256 "
COMMENT_LENGTH = len(CHECKSUM) + 64


class UnreadableCheckpointError(ValueError):
    """A file is no checkpoint, or not the one that was written."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, so that a kill, a full disk and a flipped bit lose nothing.

    A checkpoint is written beside its target, on the same file system, flushed to the disk, and only then renamed:
    until the new one is whole, the old one stays.

    Attributes:
        error: Why the last checkpoint could not be written; None if it was. An exception would leave the other
            processes waiting for this one.
    """

    error: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        try:
            write_checkpoint(checkpoint, Path(path))
            self.error = None
        except OSError as error:
            self.error = error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))


def write_checkpoint(checkpoint: dict[str, Any], file: Path) -> None:
    """Writes a checkpoint, whole or not at all.

    Its SHA-256 stands in the comment that ends a zip file, which is what torch writes: `torch.load` reads it as it is.

    Raises:
        OSError: The disk is full, or something else is in the way; what was at `file` is still there.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(-2, os.SEEK_END)
    buffer.write(COMMENT_LENGTH.to_bytes(2, "little"))
    data = buffer.getbuffer()
    with whole_file(file) as stream:
        stream.write(data)
        stream.write(CHECKSUM + hashlib.sha256(data).hexdigest().encode())


def keep_previous(last: Path) -> None:
    """Gives the newest checkpoint a second name, which it keeps when the next one takes its own."""
    previous = last.with_name(Path(PREVIOUS).name)
    if last.exists():
        previous.unlink(missing_ok=True)
        try:
            os.link(last, previous)
        except OSError:  # a file system without such links
            last.replace(previous)


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Reads a checkpoint as data: nothing in it is executed, and every bit is the one that was written.

    Raises:
        UnreadableCheckpointError: The reason.
    """
    data = file.read_bytes()
    body, comment = data[:-COMMENT_LENGTH], data[-COMMENT_LENGTH:]
    if not comment.startswith(CHECKSUM):
        raise UnreadableCheckpointError(
            f"{file} cannot be read as a checkpoint: it has no checksum at its end, so it is not whole or not ours."
        )
    if comment != CHECKSUM + hashlib.sha256(body).hexdigest().encode():
        raise UnreadableCheckpointError(
            f"{file} cannot be read as a checkpoint: its checksum is another one, so it has been damaged."
        )
    try:
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that somebody has spoiled fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than plain tensors and plain data, and is not read any further."
        raise UnreadableCheckpointError(f"{file} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UnreadableCheckpointError(
            f"{file} cannot be read as a checkpoint: it holds a {type(checkpoint).__name__}."
        )
    return checkpoint


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the newest checkpoint of a run that is whole and can be gone on from, and says which were passed over.

    Raises:
        ValueError: There is none; the message has the reason for each file.
    """
    bad = [f"{file} was being written when the run was killed." for file in run.glob(LAST + PARTIAL)]
    for file in (run / LAST, run / PREVIOUS):
        try:
            checkpoint = load_checkpoint(file)
        except FileNotFoundError:
            continue
        except (UnreadableCheckpointError, OSError) as error:
            bad.append(str(error))
            continue
        if "progress" in checkpoint:
            for reason in bad:
                log.warning("Passed over: %s Going on from %s, step %d.", reason, file.name, checkpoint["global_step"])
            return file, checkpoint
        bad.append(f"{file} holds weights that can be used, but not gone on from.")
    reasons = "; ".join(bad) or "it has no checkpoint"
    raise ValueError(f"`resume` must be the folder of a run that has saved a checkpoint, got {str(run)!r}: {reasons}.")
