"""TensorBoard's events: straight into the run's folder, one for all the numbers of a step."""

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer import record_writer
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch import Tensor

from downslope.gradients.norms import HALF
from downslope.logs.event_files import masked_checksum, varint
from downslope.logs.forgiving import silence
from downslope.logs.histograms import histogram

log = logging.getLogger(__name__)

EVENT_FILES = "events.out.tfevents.*"
LAYOUT = {
    "Loss": {"loss": ["Multiline", ["train/loss", "val/loss"]]},
    "Gradients": {
        "gradient norm": ["Multiline", ["gradient_norm/(total|applied)"]],
        "gradient norm by parameter": ["Multiline", ["gradient_norm/(?!total|applied).*"]],
    },
    "Learning-rate effects": {
        "learning rate": ["Multiline", ["learning_rate/.*", "learning_rate_effect/effective"]],
        "update ratio": ["Multiline", ["update_ratio/total.*"]],
        "cosine of successive gradients": ["Multiline", ["learning_rate_effect/gradient_cosine"]],
        "descent ratio": ["Multiline", ["learning_rate_effect/descent_ratio"]],
        "sharpness": ["Multiline", ["curvature/sharpness"]],
        "stability": ["Multiline", ["learning_rate_effect/stability"]],
    },
}


class TensorBoard(TensorBoardLogger):
    """Lightning's logger without what a run's folder has no use for: subfolders, a -1 metric, an empty hparams.yaml.

    Args:
        save_dir: The run's folder.
        flush_secs: Seconds after which events reach the disk; nothing waits for them.
    """

    def __init__(self, save_dir: str, flush_secs: float = 5.0) -> None:
        super().__init__(
            save_dir,
            name="",
            version="",
            default_hp_metric=False,
            flush_secs=flush_secs,
            max_queue=1000,  # the writer's thread is handed many events at once
        )

    def save(self) -> None:
        """Leaves the writing to the writer's own thread: Lightning calls this after every metric."""


record_writer.masked_crc32c = masked_checksum


def no_traceback(arguments: threading.ExceptHookArgs, usual: Callable[..., object] = threading.excepthook) -> None:
    """Lets TensorBoard's thread end in silence, on a full disk say: the next write raises why, and is dealt with."""
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        usual(arguments)


threading.excepthook = no_traceback


@dataclass(eq=False)
class Measurement:
    """What an observer measures at many steps in the same way.

    Attributes:
        tags: Of the values.
        derive: Makes the values, one row a step and one column a tag, out of what was taken at the steps: each part of
            a row stacked on a leading axis of steps. So what is cheap to take at a step is worked on for many at once.
    """

    tags: Sequence[str]
    derive: Callable[..., Tensor]

    def summary(self, values: Sequence[float]) -> bytes:
        """Returns values of one step as a `Summary` in the encoding of protocol buffers."""
        with suppress(OverflowError):
            return self._frame.pack(*chain.from_iterable(zip(self._texts, values, strict=True)))
        return self.summary(torch.tensor(values, dtype=torch.float64).float().tolist())  # beyond float32 lies inf

    @cached_property
    def _texts(self) -> list[bytes]:
        """What stands before each value: it is `Summary.Value`, field 1 its tag, field 2 a float of 4 bytes."""
        tags = [tag.encode() for tag in self.tags]
        fields = [b"\x0a%b%b\x15" % (varint(len(tag)), tag) for tag in tags]
        return [b"\x0a%b%b" % (varint(len(each) + 4), each) for each in fields]

    @cached_property
    def _frame(self) -> struct.Struct:
        return struct.Struct("<" + "".join(f"{len(text)}sf" for text in self._texts))


MANY = 2**20  # elements that may wait to be worked on: so many stay in a processor's cache

Row = tuple[Tensor | Sequence[float], ...]
Steps = dict[int, list[tuple[Measurement, Sequence[float]]]]


class StepWriter:
    """Collects what observers measure at a step, and writes it: one event a step and logger, one synchronisation.

    Values stay on their device until `num_rows` wait, or the first for `seconds`, or somebody asks. A logger that
    fails is warned of once and left alone from then on: logging never stops training.
    """

    def __init__(self, trainer: Trainer, num_rows: int = 256, seconds: float = 5.0) -> None:
        self._loggers: list[Logger] = list(trainer.loggers) if trainer.is_global_zero else []
        self._num_rows = num_rows
        self._seconds = seconds
        self._flushed_at = time.monotonic()
        self._rows: list[tuple[int, Measurement, Row]] = []
        self._num_waiting = self._num_elements = 0
        self._derived: list[tuple[list[int], Measurement, Tensor]] = []
        self._vectors: list[tuple[int, Tensor, Mapping[str, slice]]] = []
        self._has_warned = False
        self._failed: set[Measurement] = set()
        for logger in tuple(self._loggers):
            if isinstance(logger, TensorBoardLogger):
                self.attempt(logger, lambda logger: logger.experiment.add_custom_scalars(LAYOUT))

    @property
    def is_open(self) -> bool:
        """Tells whether anybody reads what is added."""
        return bool(self._loggers)

    def add(self, step: int, measurement: Measurement, *row: Tensor | Sequence[float]) -> None:
        """Takes what was measured at optimizer step `step`, on any device; detached."""
        self._rows.append((step, measurement, row))
        self._num_waiting += 1
        self._num_elements += sum([each.numel() for each in row if isinstance(each, Tensor)])
        if self._num_waiting >= self._num_rows or time.monotonic() - self._flushed_at > self._seconds:
            self.flush()
        elif self._num_elements > MANY:
            self._derive()

    def add_histograms(self, step: int, vector: Tensor, places: Mapping[str, slice]) -> None:
        """Takes a vector, which nobody else may write into, and the places of it that get histograms, by tag."""
        if any(isinstance(logger, TensorBoardLogger) for logger in self._loggers):
            self._vectors.append((step, vector, places))

    def _histograms(self) -> dict[int, bytes]:
        """Returns for each step the histograms that wait, of finite values: of others it warns once."""
        waiting, self._vectors = self._vectors, []
        encoded: dict[int, bytes] = {}
        for step, vector, places in waiting:
            values, summary = vector.detach().cpu(), Summary()
            values = values.float() if values.dtype in HALF else values
            for tag, place in places.items():
                finite = values[place][torch.isfinite(values[place])]
                if len(finite):
                    summary.value.append(Summary.Value(tag=tag, histo=histogram(finite)))
                if len(finite) < len(values[place]) and not self._has_warned:
                    self._has_warned = True
                    log.warning("%s is not finite at step %d: histograms are of the rest, training goes on.", tag, step)
            encoded[step] = encoded.get(step, b"") + summary.SerializeToString()
        return encoded

    def _derive(self) -> None:
        """Makes values out of what was taken, without waiting for the device."""
        rows, self._rows, self._num_elements = self._rows, [], 0
        for measurement in dict.fromkeys(measurement for _, measurement, _ in rows):
            taken = [(step, row) for step, each, row in rows if each is measurement]
            try:
                parts = [_stack(part) for part in zip(*(row for _, row in taken), strict=True)]
                values = measurement.derive(*parts)
                if values.shape != (len(taken), len(measurement.tags)):
                    raise ValueError(f"there are {len(measurement.tags)} values a step, not {list(values.shape[1:])}")
            except Exception as error:  # it costs these values, and not the logger
                if measurement not in self._failed:
                    self._failed.add(measurement)
                    log.warning("Cannot write %s at step %d: %s", measurement.tags[0], taken[0][0], error)
                continue
            self._derived.append(([step for step, _ in taken], measurement, values))

    def flush(self) -> None:
        """Writes everything that waits."""
        self._derive()
        derived, self._derived, self._num_waiting = self._derived, [], 0
        histograms = self._histograms()
        self._flushed_at = time.monotonic()
        steps: Steps = {
            step: [] for step in sorted({*histograms, *(step for taken, _, _ in derived for step in taken)})
        }
        if not steps:
            return
        for taken, measurement, values in derived:
            for step, row in zip(taken, values.tolist(), strict=True):
                steps[step].append((measurement, row))
        for logger in tuple(self._loggers):
            self.attempt(logger, lambda logger: _write(logger, steps, histograms))

    def attempt(self, logger: Any, write: Any) -> None:
        """Writes; after a failure never again to this logger."""
        try:
            write(logger)
        except Exception as error:
            self._loggers.remove(logger)
            silence(logger, error)


def _stack(part: Sequence[Any]) -> Tensor:
    """One part of many rows, on a leading axis."""
    if not isinstance(part[0], Tensor):
        return torch.tensor(part, dtype=torch.float64)
    return torch.stack(part) if len(part) > 1 else part[0][None]  # type: ignore[arg-type]


def _write(logger: Logger, steps: Steps, histograms: Mapping[int, bytes]) -> None:
    if isinstance(logger, TensorBoardLogger):
        _write_events(logger.experiment.file_writer.event_writer, steps, histograms)
        return
    for step, taken in steps.items():
        logger.log_metrics(
            {tag: value for each, values in taken for tag, value in zip(each.tags, values, strict=True)}, step
        )


def _write_events(writer: EventFileWriter, steps: Steps, histograms: Mapping[int, bytes]) -> None:
    """Writes an event a step, all in one go.

    The stock writer hands each event to its thread, at more cost than the event itself. Here, when the thread has
    written what it was given, the records go straight into its file: the order is kept.
    """
    now = time.time()
    records = bytearray()
    for step, taken in steps.items():
        scalars = b"".join([each.summary(values) for each, values in taken])
        event = _event(now, step, scalars + histograms.get(step, b""))
        length = len(event).to_bytes(8, "little")
        for part in (length, event):
            records += part + masked_checksum(part).to_bytes(4, "little")
    pipe = writer._async_writer
    pipe.flush()  # raises what went wrong in the thread
    with pipe._lock:
        pipe._writer._writer.write(bytes(records))
        pipe._writer.flush()


def _event(wall_time: float, step: int, summary: bytes) -> bytes:
    """An `Event` as protocol buffers encode it: field 1 the time, 2 the step, 5 the summary."""
    return b"\x09%b\x10%b\x2a%b%b" % (struct.pack("<d", wall_time), varint(step), varint(len(summary)), summary)


_WRITERS: WeakKeyDictionary[Trainer, StepWriter] = WeakKeyDictionary()


def step_writer(trainer: Trainer) -> StepWriter:
    """Returns the writer that all observers of a trainer share."""
    if trainer not in _WRITERS:
        _WRITERS[trainer] = StepWriter(trainer)
    return _WRITERS[trainer]


def write_scalars(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Sends values to every logger of the trainer at once, under the x-axis of optimizer steps."""
    writer = step_writer(trainer)
    if writer.is_open:
        writer.add(step, Measurement(list(values), lambda row: row), list(values.values()))
        writer.flush()


def flush_step_writer(trainer: Trainer) -> None:
    """Writes what waits, into the files."""
    if writer := _WRITERS.get(trainer):
        writer.flush()
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            try:
                logger.experiment.flush()
            except Exception as error:
                silence(logger, error)


def event_files(trainer: Trainer) -> dict[str, int]:
    """Returns the length of each event file, by name: what a checkpoint knows of the curves."""
    folders = {Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)}
    return {file.name: file.stat().st_size for folder in folders for file in folder.glob(EVENT_FILES)}


def rewind_event_files(folder: Path, lengths: Mapping[str, int]) -> None:
    """Takes out of the curves what was written after a checkpoint, and will be written again.

    TensorBoard's own way, a `purge_step`, cannot tell an epoch's mean from the measurements of the step after it: both
    stand at one step, the first before the checkpoint and the others after.
    """
    for file in folder.glob(EVENT_FILES):
        if file.name not in lengths:
            file.unlink()
        elif file.stat().st_size > lengths[file.name]:
            os.truncate(file, lengths[file.name])


def announce_restart(trainer: Trainer) -> None:
    """Tells a dashboard that is open to forget what it has read of later steps."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            start = SessionLog(status=SessionLog.START)
            event = Event(session_log=start, step=trainer.global_step + 1)
            step_writer(trainer).attempt(
                logger, lambda logger, event=event: logger.experiment.file_writer.add_event(event)
            )


def write_text(trainer: Trainer, tag: str, text: str) -> None:
    """Shows a text as it stands, in TensorBoard alone, when training begins (again): beside a resumed run's first."""

    def on_train_start(trainer: Trainer, module: LightningModule) -> None:
        writer = step_writer(trainer)
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # how Markdown spells a listing
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                writer.attempt(logger, lambda logger: logger.experiment.add_text(tag, indented, trainer.global_step))

    trainer.callbacks.append(LambdaCallback(on_train_start=on_train_start))  # type: ignore[attr-defined]


def write_picture(trainer: Trainer, tag: str, png: bytes, step: int) -> None:
    """Writes a picture into every TensorBoard as it is; `add_image` would unpack and pack it again."""
    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment._get_file_writer().add_summary(summary, step)


def close_step_writer(trainer: Trainer) -> None:
    """Writes what waits, before the loggers close; observers call it on teardown and on an exception."""
    if writer := _WRITERS.pop(trainer, None):
        writer.flush()
