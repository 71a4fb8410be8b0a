"""A run's curves: scalars out of TensorBoard's event files, read a thousand runs at a time."""

from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event

from downslope.logs.event_files import records

Curve = dict[int, float]


def read_curves(run: Path, tags: frozenset[str]) -> Mapping[str, Curve]:
    """Returns value by step for each tag that the run has.

    Args:
        run: The run's folder.
        tags: Which scalars; of a step written twice the later one counts.
    """
    curves: dict[str, Curve] = {}
    for file in sorted(run.glob("events.out.tfevents.*")):
        for record in records(file.read_bytes()):
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.tag in tags and value.HasField("simple_value"):
                    curves.setdefault(value.tag, {})[event.step] = value.simple_value
    return curves
