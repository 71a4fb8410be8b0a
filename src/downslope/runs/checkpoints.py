"""A run's checkpoints: plain tensors and plain data, written whole or not at all, and read as nothing else."""

import contextlib
import hashlib
import io
import logging
import os
import pickle
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO

from downslope.runs.whole_files import PARTIAL, whole_file

log = logging.getLogger(__name__)

BEST = "checkpoints/best.ckpt"
LAST = "checkpoints/last.ckpt"
PREVIOUS = "checkpoints/previous.ckpt"
CHECKSUM = b"downslope sha256 "
PACKAGES = ("lightning", "hydra-core", "numpy", "downslope")
COMMENT_LENGTH = len(CHECKSUM) + 64
SAVED: dict[str, type] = {  # what is resumed from, by Lightning and by ourselves
    "global_step": int, "state_dict": dict, "loops": dict, "callbacks": dict, "optimizer_states": list,
    "lr_schedulers": list, "progress": dict,
}  # fmt: skip
PROGRESS: dict[str, type] = {
    "batch": int, "processes": list, "seconds": float, "model": str, "metrics": dict, "optimizers": list,
    "schedulers": list, "settings": list, "event_files": dict,
}  # fmt: skip


class UnreadableCheckpointError(ValueError):
    """A file is no checkpoint, or not the one that was written."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, so that a kill, a full disk and a flipped bit lose nothing.

    Attributes:
        error: Why the last checkpoint could not be written; None if it was. An exception would leave the other
            processes waiting for this one.
    """

    error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            write_checkpoint(checkpoint, Path(path))
            self.error = None
        except OSError as error:
            self.error = error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return load_checkpoint(Path(path))


def write_checkpoint(checkpoint: dict[str, Any], file: Path) -> None:
    """Writes a checkpoint, whole or not at all.

    Raises:
        OSError: The disk is full, or something else is in the way; what was at `file` is still there.
    """
    with whole_file(file) as stream:
        stream.write(as_bytes(checkpoint))


def as_bytes(checkpoint: dict[str, Any]) -> bytes:
    """Returns a checkpoint as it stands in its file.

    Its SHA-256 stands in the comment that ends a zip file, which is what torch writes: `torch.load` reads it as it is.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(-2, os.SEEK_END)
    buffer.write(COMMENT_LENGTH.to_bytes(2, "little"))
    data = buffer.getvalue()
    return data + CHECKSUM + hashlib.sha256(data).hexdigest().encode()


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
    checkpoint, reason = None, "it holds no dictionary."
    if not comment.startswith(CHECKSUM):
        reason = "it has no checksum at its end, so it is incomplete, or Downslope did not write it."
    elif comment != CHECKSUM + hashlib.sha256(body).hexdigest().encode():
        reason = "its checksum does not match, so it has been damaged."
    else:
        try:
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            reason = "it holds more than plain tensors and plain data, and is not read any further."
        except Exception as error:  # bytes that somebody has spoiled fail in many ways
            reason = (str(error) or type(error).__name__).splitlines()[0]
    if not isinstance(checkpoint, dict):
        raise UnreadableCheckpointError(f"{file} cannot be read as a checkpoint: {reason}")
    return checkpoint


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the newest checkpoint of a run that is whole and can be resumed, and says which were passed over.

    Raises:
        ValueError: There is none; the message has the reason for each file.
    """
    bad = [f"{file} was being written when the run was killed." for file in run.glob(f"{LAST}*{PARTIAL}")]
    for file in (run / LAST, run / PREVIOUS):
        try:
            checkpoint = load_checkpoint(file)
            if "progress" in checkpoint:
                _check_kinds(file, checkpoint)
        except FileNotFoundError:
            continue
        except (UnreadableCheckpointError, OSError) as error:
            bad.append(str(error))
            continue
        if "progress" in checkpoint:
            for reason in bad:
                log.warning("Skipped: %s Resuming from %s, step %d.", reason, file.name, checkpoint["global_step"])
            return file, checkpoint
        bad.append(f"{file} holds weights that can be used, but not resumed from.")
    reasons = "; ".join(bad) or "it has no checkpoint"
    raise ValueError(f"`resume` must be the folder of a run that has saved a checkpoint, got {str(run)!r}: {reasons}.")


def checkpoint_of(run: Path, data: object, module: LightningModule) -> tuple[Path, dict[str, Any]]:
    """Returns the checkpoint to resume from, if it is one of this model and of these data.

    Args:
        run: Its folder.
        data: That it would be resumed with.
        module: That it would be resumed with.

    Raises:
        ValueError: There is none that is whole, or it is of something else; the message names both.
    """
    file, checkpoint = newest_checkpoint(run)
    with what_a_run_saves(file):
        progress = checkpoint["progress"]
        check_same(file, "model", progress["model"], name_of(module))
        check_same(file, "set of weights", _shapes(checkpoint["state_dict"]), _shapes(module.state_dict()))
        check_same(file, "set of data", progress["data"], fingerprint(data))
        there = dict(progress.get("versions", {}))
        others = {name: here for name, here in versions().items() if there.get(name, here) != here}
        changed = [f"{name} {there[name]} there, {here} here" for name, here in others.items()]
    if changed:
        log.warning("Saved with other versions, so the last bits may differ: %s.", ", ".join(changed))
    return file, checkpoint


def versions() -> dict[str, str]:
    """Returns the versions of what makes a run's numbers."""
    build = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # its sources are on the path, and it was not installed
            build[name] = version(name)
    return build


@contextlib.contextmanager
def what_a_run_saves(file: Path) -> Iterator[None]:
    """Turns what Python says of a checkpoint that lacks something, or holds something else, into one message."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UnreadableCheckpointError(f"{file} does not hold what a run saves: {missing}.") from error


def _check_kinds(file: Path, checkpoint: dict[str, Any]) -> None:
    with what_a_run_saves(file):
        for holder, kinds in ((checkpoint, SAVED), (checkpoint["progress"], PROGRESS)):
            for key, kind in kinds.items():
                if not isinstance(holder[key], kind):
                    raise TypeError(f"{key!r} is a {type(holder[key]).__name__}, not a {kind.__name__}")


def check_same(file: Path, what: str, saved: Any, here: Any) -> None:
    """Refuses a checkpoint that was made with something else.

    Raises:
        ValueError: Both are named.
    """
    if saved != here:
        there, now = (", ".join(each) or "none" if isinstance(each, list) else each for each in (saved, here))
        raise ValueError(
            f"Cannot resume from {file}. This is because it was made with a different {what}: "
            f"{there} there, {now} here."
        )


def fingerprint(data: object) -> str | None:
    """Returns what a datamodule says of the numbers that it serves, None where it says nothing."""
    return str(data.fingerprint()) if hasattr(data, "fingerprint") else None


def name_of(thing: object) -> str:
    """Returns the full name of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _shapes(state: dict[str, Any]) -> list[str]:
    return [f"{name} {list(value.shape)}" for name, value in state.items()]
