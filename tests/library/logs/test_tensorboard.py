"""The event file as TensorBoard itself reads it."""

import io
import math
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from downslope.logs.tensorboard import (
    LAYOUT,
    Measurement,
    StepWriter,
    TensorBoard,
    close_loggers,
    close_step_writer,
    step_writer,
    write_picture,
)

VALUES = [0.1, -1e-40, math.inf, -math.inf, math.nan, 3.5]


def writer_and_folder(folder: Path, **settings: float) -> tuple[StepWriter, TensorBoardLogger]:
    logger = TensorBoardLogger(folder, name="", version="")
    trainer = Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    return StepWriter(trainer, **settings), logger  # type: ignore[arg-type]


def events(folder: Path) -> list[Event]:
    (file,) = folder.glob("events.out.tfevents.*")
    return [Event.FromString(record) for record in RawEventFileLoader(str(file)).Load()]


def test_all_histograms_of_a_step_are_one_event(tmp_path: Path) -> None:
    writer, _ = writer_and_folder(tmp_path)
    double = torch.tensor([3.0, math.nan, 4.0], dtype=torch.float64)
    writer.add(7, Measurement(["a", "b"], lambda row: row), [1.0, 2.0])
    writer.add_histograms(7, {"half": torch.tensor([1.0, 2.0]).half(), "none": torch.empty(0)})
    writer.add_histograms(7, {"double": double[:1], "broken": double[1:]})
    writer.flush()
    (event,) = [event for event in events(tmp_path) if event.step == 7]
    assert [each.simple_value for each in event.summary.value[:2]] == [1.0, 2.0]
    assert {each.tag: (each.histo.num, each.histo.sum) for each in event.summary.value[2:]} == {
        "half": (2.0, 3.0),
        "double": (1.0, 3.0),
        "broken": (1.0, 4.0),
    }


def test_what_is_no_number_or_beyond_float32_is_written_as_the_format_has_it(tmp_path: Path) -> None:
    tags, values = ["ä.weight", *"abcde", "large"], [*VALUES, -1e300]
    writer, _ = writer_and_folder(tmp_path)
    writer.add(2**40, Measurement(tags, lambda row: row), values)
    writer.flush()
    event = events(tmp_path)[-1]
    assert (event.step, [each.tag for each in event.summary.value]) == (2**40, tags)
    written = torch.tensor([each.simple_value for each in event.summary.value], dtype=torch.float64)
    expected = [0.10000000149011612, -9.99994610111476e-41, math.inf, -math.inf, math.nan, 3.5, -math.inf]
    assert written.tolist() == pytest.approx(expected, rel=1e-15, abs=0, nan_ok=True)


def test_all_measurements_of_a_step_are_one_event_and_the_order_is_kept(tmp_path: Path) -> None:
    writer, logger = writer_and_folder(tmp_path)
    one, other = Measurement(["a"], lambda row: row), Measurement(["b", "c"], lambda row: 2 * row)
    logger.experiment.add_scalar("before", 1.0, 0)
    for step in range(200):
        writer.add(step, one, [float(step)])
        writer.add(step, other, [1.0, 2.0])
    writer.flush()
    logger.experiment.add_scalar("after", 1.0, 200)
    logger.experiment.flush()
    written = [event for event in events(tmp_path) if event.summary.value]
    tags = [[value.tag for value in event.summary.value] for event in written]
    assert tags[1:] == [["before"], *[["a", "b", "c"]] * 200, ["after"]]  # the layout is first
    assert [event.summary.value[0].simple_value for event in written[2:-1]] == [float(step) for step in range(200)]
    assert [event.step for event in written[2:-1]] == list(range(200))


def test_a_broken_record_would_be_noticed(tmp_path: Path) -> None:
    writer, _ = writer_and_folder(tmp_path)
    writer.add(0, Measurement(["a"], lambda row: row), [1.0])
    writer.flush()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    whole = events(tmp_path)
    data = bytearray(file.read_bytes())
    data[-5:-4] = struct.pack("B", data[-5] ^ 1)  # the last byte of the value
    file.write_bytes(data)
    assert len(events(tmp_path)) == len(whole) - 1


def test_a_slow_run_is_seen_before_many_rows_wait(tmp_path: Path) -> None:
    writer, _ = writer_and_folder(tmp_path, seconds=0.05)
    measurement = Measurement(["a"], lambda row: row)
    writer.add(0, measurement, [1.0])
    time.sleep(0.06)
    writer.add(1, measurement, [2.0])
    assert [event.summary.value[0].simple_value for event in events(tmp_path)[-2:]] == [1.0, 2.0]


def test_closing_writes_what_waits(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    step_writer(trainer).add(7, Measurement(["a"], lambda row: row), [1.0])
    close_step_writer(trainer)
    assert events(tmp_path)[-1].step == 7


def test_the_values_of_a_call_are_one_event(tmp_path: Path) -> None:
    logger = TensorBoard(str(tmp_path))
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 3}, step=7)
    event = events(tmp_path)[-1]
    assert event.step == 7
    assert {each.tag: each.simple_value for each in event.summary.value} == {
        "train/loss": 0.5,
        "Loss/log10_train": pytest.approx(-0.30103),  # log₁₀ ½
    }


def charts(tag: str) -> set[str]:
    """The charts of Custom Scalars that show a tag, by the plugin's own rule: a pattern matches from its beginning."""
    return {
        name
        for category in LAYOUT.values()
        for name, (_, patterns) in category.items()
        if any(re.match(pattern, tag) for pattern in patterns)
    }


def test_custom_scalars_show_a_tasks_own_names() -> None:
    assert charts("train/loss") == charts("val/loss") == charts("g_loss") == {"loss"}
    assert charts("val/accuracy") == charts("test/mae") == {"other metrics"}
    assert charts("learning_rate/SGD") == charts("learning_rate_effect/critical") == {"learning rate"}
    assert charts("learning_rate_effect/critical_ratio") == {"learning rate ÷ critical"}
    assert charts("epoch") == set()


class Gallery(CSVLogger):
    """A logger as wandb's: it takes pictures, and what it writes to has to be ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pictures: list[tuple[str, tuple[int, int], int]] = []
        self._experiment = self
        self.ended = 0

    @property
    def experiment(self) -> Any:
        return self

    def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
        self.pictures += [(key, image.size, step) for image in images]

    def finish(self) -> None:
        self.ended += 1


def test_a_logger_that_takes_pictures_gets_them_and_is_ended_with_its_run(tmp_path: Path) -> None:
    logger, picture = Gallery(tmp_path), io.BytesIO()
    trainer = Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    Image.new("RGB", (3, 2)).save(picture, "png")
    write_picture(trainer, "pictures/small", picture.getvalue(), 7)
    close_loggers(trainer)
    assert logger.pictures == [("pictures/small", (3, 2), 7)]
    assert logger.ended == 1
