"""TensorBoard's event files, record by record, with a compiled checksum."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from struct import pack

import google_crc32c
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

EVENT_FILES = "events.out.tfevents.*"


def masked_checksum(data: bytes) -> int:
    """Returns the CRC-32C of a record as an event file wants it: rotated by 15 bits, plus a constant.

    TensorBoard computes it in Python, a byte at a time: 300 µs for the numbers of one step, more than the step itself.
    """
    checksum: int = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records(content: bytes) -> Iterator[bytes]:
    """Yields a file's records up to the first that is not whole: the run was killed there, or still writes."""
    start = 12  # 8 bytes of length, 4 of its checksum; after the data come 4 of its own
    while start + 4 <= len(content):
        end = start + int.from_bytes(content[start - 12 : start - 4], "little")
        data = content[start:end]
        if content[end : end + 4] != masked_checksum(data).to_bytes(4, "little"):
            return
        yield data
        start = end + 16


@cache
def _around_values(tags: tuple[str, ...], step: int, wall_time: float) -> list[bytes]:
    """What stands before, between and after the four bytes of each value in an event."""
    mark = 1.2345678e-30
    values = [Summary.Value(tag=tag, simple_value=mark) for tag in tags]
    event = Event(wall_time=wall_time, step=step, summary=Summary(value=values))
    parts: list[bytes] = event.SerializeToString().split(pack("<f", mark))
    return parts


def encoded_scalars(scalars: Mapping[int, Mapping[str, float]], wall_time: float) -> bytes:
    """Returns an event for each step of its values by tag, quickly where many runs measured alike."""
    records = []
    for step, values in scalars.items():
        first, *parts = _around_values(tuple(values), step, wall_time)
        pairs = zip(values.values(), parts, strict=True)
        records.append(first + b"".join(pack("<f", value) + part for value, part in pairs))
    return _framed(records)


def encoded(events: Iterable[Event]) -> bytes:
    """Returns events as they stand in a file."""
    return _framed(event.SerializeToString() for event in events)


def _framed(records: Iterable[bytes]) -> bytes:
    """Puts each record behind its length, either with its checksum."""
    return b"".join(part for record in records for part in (_length(len(record)), _checked(record)))


@cache
def _length(length: int) -> bytes:
    return _checked(length.to_bytes(8, "little"))


def _checked(part: bytes) -> bytes:
    return part + masked_checksum(part).to_bytes(4, "little")


def append(writer: EventFileWriter, events: Iterable[Event]) -> None:
    """Writes events to a writer's file at once, after all that its thread was given: the order is kept.

    Raises:
        OSError: The file cannot be written, now or when the thread tried.
    """
    content = encoded(events)
    writer.flush()
    with writer._async_writer._lock:
        writer._general_file_writer.write(content)
        writer._general_file_writer.flush()
