"""TensorBoard's events: straight into the run's folder, one for everything of a step."""

import io
import logging
import math
import os
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard.summary import custom_scalars, text

from downslope.logs.event_files import EVENT_FILES, append
from downslope.logs.histograms import histogram, num_not_finite, spreads
from downslope.logs.non_raising import attempt, is_off, log_values

log = logging.getLogger(__name__)

# What a dashboard opens on: it sorts by name, capitals first, and its layouts know no logarithmic axis.
LOGARITHMS = {"train/loss": "Loss/log10_train", "val/loss": "Loss/log10_val"}

# Tags by regular expression: what a module logs itself is called as its author likes.
LAYOUT = {
    "Loss": {
        "log₁₀ of the loss": ["Multiline", ["Loss/log10_.*"]],
        "loss": ["Multiline", ["(?!train/excess_).*loss.*"]],
        "other metrics": ["Multiline", ["(train|val|test)/(?!.*loss).*"]],
    },
    "Gradients": {
        "gradient norm": ["Multiline", ["gradient_norm/(total|applied)"]],
        "gradient norm by parameter": ["Multiline", ["gradient_norm/(?!total|applied).*"]],
    },
    "Learning-rate effects": {
        "learning rate": ["Multiline", ["learning_rate/.*", "learning_rate_effect/(effective|critical(?!_ratio))"]],
        "learning rate ÷ critical": ["Multiline", ["learning_rate_effect/critical_ratio"]],
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
        flush_secs: Seconds after which events of other writers (`experiment.add_…`) reach the disk; ours do at once.
    """

    def __init__(self, save_dir: str, flush_secs: float = 5.0) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False, flush_secs=flush_secs, max_queue=1000)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Writes all values as one event."""
        _append(self, [_event(step or 0, *_scalars(metrics))])

    def finalize(self, status: str) -> None:
        """Writes what waits, and stays open: a test pass may follow the fit."""
        if self._experiment is not None:
            self.experiment.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._experiment is not None:
            self.experiment.close()
            self._experiment = None

    def save(self) -> None:
        """Leaves out Lightning's empty hparams.yaml; what is logged is on the disk."""


def _event(step: int, *values: Summary.Value) -> Event:
    return Event(wall_time=time.time(), step=step, summary=Summary(value=values))


def _scalars(values: Mapping[str, Any]) -> list[Summary.Value]:
    """All but the epoch, which says nothing beside the steps."""
    shown = with_logarithms({tag: float(value) for tag, value in values.items() if tag != "epoch"})
    return [Summary.Value(tag=tag, simple_value=value) for tag, value in shown.items()]


def with_logarithms(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the values, and beside a loss its logarithm: on that scale a run that diverges does not hide the rest."""
    logarithms = {new: math.log10(values[tag]) for tag, new in LOGARITHMS.items() if values.get(tag, 0.0) > 0}
    return {**values, **logarithms}


def _append(logger: TensorBoardLogger, events: Iterable[Event]) -> None:
    append(logger.experiment.file_writer.event_writer, events)


def append_everywhere(trainer: Trainer, events: Iterable[Event]) -> None:
    """Writes events into every TensorBoard of the trainer."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            attempt(logger, _append, logger, events)


@dataclass(frozen=True, eq=False)
class Measurement:
    """What an observer measures at many steps in the same way.

    Attributes:
        tags: Of the values.
        derive: Makes the values, one row a step and one column a tag, out of what was taken at the steps: each part of
            a row stacked on a leading axis of steps. So what is cheap to take at a step is worked on for many at once.
    """

    tags: Sequence[str]
    derive: Callable[..., Tensor]


MANY = 2**20  # elements that may wait to be worked on: so many stay in a processor's cache

Row = tuple[Tensor | Sequence[float], ...]


class StepWriter:
    """Collects what observers measure at a step, and writes it: one event a step and logger, one synchronisation.

    Values stay on their device until `num_rows` wait, or the first for `seconds`, or somebody asks.
    """

    def __init__(self, trainer: Trainer, num_rows: int = 256, seconds: float = 5.0) -> None:
        self._loggers: list[Logger] = list(trainer.loggers) if trainer.is_global_zero else []
        self._num_rows = num_rows
        self._seconds = seconds
        self._flushed_at = time.monotonic()
        self._rows: dict[Measurement, list[tuple[int, Row]]] = {}
        self._num_waiting = self._num_elements = 0
        self._derived: list[tuple[list[int], Measurement, Tensor]] = []
        self._spreads: list[tuple[int, list[str], Tensor]] = []
        self._told: set[object] = set()  # what was warned of
        append_everywhere(trainer, [Event(wall_time=time.time(), summary=custom_scalars(LAYOUT))])

    @property
    def is_open(self) -> bool:
        """Tells whether anybody reads what is added."""
        return not all(map(is_off, self._loggers))

    def add(self, step: int, measurement: Measurement, *row: Tensor | Sequence[float]) -> None:
        """Takes what was measured at optimizer step `step`, on any device; detached."""
        self._rows.setdefault(measurement, []).append((step, row))
        self._num_waiting += 1
        self._num_elements += sum([each.numel() for each in row if isinstance(each, Tensor)])
        if self._num_waiting >= self._num_rows or time.monotonic() - self._flushed_at > self._seconds:
            self.flush()
        elif self._num_elements > MANY:
            self._derive()

    def add_histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Takes what gets histograms, by tag; nothing of it is kept."""
        if any(isinstance(logger, TensorBoardLogger) and not is_off(logger) for logger in self._loggers):
            filled = {tag: values for tag, values in tensors.items() if values.numel()}
            self._spreads += [(step, [*filled], spreads([*filled.values()]))] if filled else []

    def flush(self) -> None:
        """Writes everything that waits."""
        self._derive()
        derived, self._derived, self._num_waiting = self._derived, [], 0
        scalars: dict[int, dict[str, float]] = defaultdict(dict)
        for steps, measurement, values in derived:
            for step, row in zip(steps, values.tolist(), strict=True):
                scalars[step].update(zip(measurement.tags, row, strict=True))
        histograms = self._histograms()
        self._flushed_at = time.monotonic()
        steps = sorted({*scalars, *histograms})
        events = [_event(step, *_scalars(scalars.get(step, {})), *histograms.get(step, ())) for step in steps]
        for logger in self._loggers if events else ():
            if isinstance(logger, TensorBoardLogger):
                attempt(logger, _append, logger, events)
            else:
                for step in sorted(scalars):
                    attempt(logger, log_values, logger, logger.log_metrics, scalars[step], step)

    def _derive(self) -> None:
        """Makes values out of what was taken, without waiting for the device."""
        rows, self._rows, self._num_elements = self._rows, {}, 0
        for measurement, taken in rows.items():
            steps = [step for step, _ in taken]
            try:
                values = measurement.derive(*map(_stack, zip(*(row for _, row in taken), strict=True)))
                if values.shape != (len(taken), len(measurement.tags)):
                    raise ValueError(f"there are {len(measurement.tags)} values a step, not {list(values.shape[1:])}")
                self._derived.append((steps, measurement, values))
            except Exception as error:  # it costs these values, and not the logger
                self._warn_once(measurement, "Cannot write %s at step %d: %s", measurement.tags[0], steps[0], error)

    def _histograms(self) -> dict[int, list[Summary.Value]]:
        """Returns for each step the histograms that wait, of finite values: of others it warns once."""
        waiting, self._spreads = self._spreads, []
        found: dict[int, list[Summary.Value]] = defaultdict(list)
        counts = torch.cat([each for *_, each in waiting]).cpu().numpy() if waiting else ()
        about = [(step, tag) for step, tags, _ in waiting for tag in tags]
        for (step, tag), counted in zip(about, counts, strict=True):
            if histo := histogram(counted):
                found[step].append(Summary.Value(tag=tag, histo=histo))
            if num_not_finite(counted):
                words = "%s is not finite at step %d: histograms show the finite values only; training continues."
                self._warn_once("histograms", words, tag, step)
        return found

    def _warn_once(self, about: object, words: str, *values: object) -> None:
        if about not in self._told:
            self._told.add(about)
            log.warning(words, *values)


def _stack(part: Sequence[Any]) -> Tensor:
    """One part of many rows, on a leading axis; of one row without a copy."""
    if not isinstance(part[0], Tensor):
        return torch.tensor(part, dtype=torch.float64)
    return torch.stack(part) if len(part) > 1 else part[0][None]  # type: ignore[arg-type]


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
    """Writes what waits, into the files of every logger."""
    if writer := _WRITERS.get(trainer):
        writer.flush()
    for logger in trainer.loggers if trainer.is_global_zero else []:
        attempt(logger, _flush, logger)


def _flush(logger: Logger) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.flush()
    else:
        logger.save()


def close_step_writer(trainer: Trainer) -> None:
    """Writes what waits, before the loggers close; observers call it on teardown and on an exception."""
    if writer := _WRITERS.pop(trainer, None):
        writer.flush()


def write_markdown(trainer: Trainer, tag: str, words: str, step: int) -> None:
    """Shows words in TensorBoard alone."""
    append_everywhere(trainer, [Event(wall_time=time.time(), step=step, summary=text(tag, words))])


def write_text(trainer: Trainer, tag: str, listing: str) -> None:
    """Shows a text as it stands, in TensorBoard alone, when training begins (again): beside a resumed run's first."""
    indented = "".join(f"    {line}\n" for line in listing.splitlines())  # how Markdown spells a listing

    def on_train_start(trainer: Trainer, module: LightningModule) -> None:
        write_markdown(trainer, tag, indented, trainer.global_step)

    trainer.callbacks.append(LambdaCallback(on_train_start=on_train_start))  # type: ignore[attr-defined]


def write_picture(trainer: Trainer, tag: str, png: bytes, step: int) -> None:
    """Writes a picture into every TensorBoard as it is, and to each other logger that has Lightning's `log_image`."""
    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    append_everywhere(trainer, [_event(step, Summary.Value(tag=tag, image=image))])
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            attempt(logger, logger.log_image, tag, [Image.open(io.BytesIO(png))], step)


def announce_restart(trainer: Trainer) -> None:
    """Tells a dashboard that is open to forget what it has read of later steps."""
    start = SessionLog(status=SessionLog.START)
    append_everywhere(trainer, [Event(wall_time=time.time(), session_log=start, step=trainer.global_step + 1)])


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


def close_loggers(trainer: Trainer) -> None:
    """Writes what waits, and ends the files of those loggers that stay open between two passes."""
    close_step_writer(trainer)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoard):
            attempt(logger, logger.close)
        elif finish := getattr(getattr(logger, "_experiment", None), "finish", None):  # wandb's would take the next job
            attempt(logger, finish)
