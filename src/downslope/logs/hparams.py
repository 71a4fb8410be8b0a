"""TensorBoard's HPARAMS tab: what a run was asked for, against what came of it."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from downslope.logs.event_files import EVENT_FILES, encoded

log = logging.getLogger(__name__)


def write_hparams(folder: Path, asked: Mapping[str, Any], came: Mapping[str, float | None], step: int) -> None:
    """Adds a run's line in HPARAMS to its event file; its loggers are closed.

    A run without an event file has no line; what cannot be written is warned of.
    """
    file = max(folder.glob(EVENT_FILES), key=lambda file: file.stat().st_mtime, default=None)
    if not file:
        return
    try:
        with file.open("ab") as stream:
            stream.write(hparams_line(asked, came, step))
    except OSError as error:
        log.warning("Cannot write the run's line for HPARAMS: %s", error)


def hparams_line(asked: Mapping[str, Any], came: Mapping[str, float | None], step: int) -> bytes:
    """Returns a run's line as it stands in an event file: what was asked for against what came of it.

    HPARAMS takes metrics that are numbers, and of a run the first line that it finds. So a verdict, a word, belongs to
    what was asked for, and the line is written when the run has ended: after its last checkpoint, so that resuming
    takes it out of the file (`rewind_event_files`), and the new end writes another.

    Args:
        asked: By name; None is left out.
        came: By tag, what matters most first. The tab shows the last value of a tag's curve; where there is no curve a
            value stands here, else None.
        step: Optimizer steps taken.
    """
    line = {name: value for name, value in asked.items() if value is not None}
    experiment, *session = hparams(line, dict.fromkeys(came, 0.0))
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in came.items() if value is not None]
    summaries = [_in_sight(experiment), *session, Summary(value=values)]
    return encoded(Event(wall_time=time.time(), step=step, summary=each) for each in summaries)


def _in_sight(experiment: Summary) -> Summary:
    """Marks what must be seen: the tab begins with five columns, those said to differ first; `data` can wait."""
    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name != "data"
    plugin.content = data.SerializeToString()
    return experiment
