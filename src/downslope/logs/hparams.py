"""TensorBoard's HPARAMS tab: what a run was asked for, against what came of it."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import DataType, Experiment, HParamInfo, MetricInfo, MetricName, Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

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
    start = SessionStartInfo()
    for name, value in line.items():
        if isinstance(value, int | float):
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = str(value)
    # The tab begins with five columns, those said to differ first; `data` can wait.
    infos = [HParamInfo(name=name, type=_type(value), differs=name != "data") for name, value in line.items()]
    metrics = [MetricInfo(name=MetricName(tag=tag)) for tag in came]
    numbers = [Summary.Value(tag=tag, simple_value=value) for tag, value in came.items() if value is not None]
    values = [
        [_said(metadata.EXPERIMENT_TAG, experiment=Experiment(hparam_infos=infos, metric_infos=metrics))],
        [_said(metadata.SESSION_START_INFO_TAG, session_start_info=start)],
        [_said(metadata.SESSION_END_INFO_TAG, session_end_info=SessionEndInfo(status=Status.STATUS_SUCCESS))],
        numbers,
    ]
    return encoded(Event(wall_time=time.time(), step=step, summary=Summary(value=each)) for each in values)


def _type(value: Any) -> DataType:
    return DataType.DATA_TYPE_FLOAT64 if isinstance(value, int | float) else DataType.DATA_TYPE_STRING


def _said(tag: str, **content: Any) -> Summary.Value:
    """What the tab reads. torch would write the same, and to import that takes longer than a small run's training."""
    data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
