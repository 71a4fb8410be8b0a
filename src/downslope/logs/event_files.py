"""TensorBoard's event files, record by record, with a compiled checksum."""

import struct
from collections.abc import Iterable, Iterator

import google_crc32c
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

EVENT_FILES = "events.out.tfevents.*"
HEADER = struct.Struct("<QI")  # the data's length, and that length's checksum; after the data comes its own


def masked_checksum(data: bytes) -> int:
    """Returns the CRC-32C of a record as an event file wants it: rotated by 15 bits, plus a constant.

    TensorBoard computes it in Python, a byte at a time: 300 µs for the numbers of one step, more than the step itself.
    """
    checksum: int = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """Returns data as it stands in an event file, between its length and its checksum."""
    length = len(data).to_bytes(8, "little")
    checksums = (masked_checksum(part).to_bytes(4, "little") for part in (length, data))
    return length + next(checksums) + data + next(checksums)


def records(content: bytes) -> Iterator[bytes]:
    """Yields a file's records up to the first that is not whole: the run was killed there, or still writes."""
    start = HEADER.size
    while start + 4 <= len(content):
        length, _ = HEADER.unpack_from(content, start - HEADER.size)
        end = start + length
        data = content[start:end]
        if content[end : end + 4] != masked_checksum(data).to_bytes(4, "little"):
            return
        yield data
        start = end + 4 + HEADER.size


def encoded(events: Iterable[Event]) -> bytes:
    """Returns events as they stand in a file."""
    return b"".join(record(event.SerializeToString()) for event in events)


def append(writer: EventFileWriter, events: Iterable[Event]) -> None:
    """Writes events to a writer's file at once, after all that its thread was given: the order is kept.

    Handing an event to the thread costs more than writing it, and the thread computes the checksum in Python.

    Raises:
        OSError: The file cannot be written, now or when the thread tried.
    """
    content = encoded(events)
    writer.flush()
    with writer._async_writer._lock:
        writer._general_file_writer.write(content)
        writer._general_file_writer.flush()
