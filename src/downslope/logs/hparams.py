"""TensorBoard's HPARAMS tab: what a run was asked for, against what came of it."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from downslope.logs.event_files import EVENT_FILES, encoded
from downslope.runs.result import Result

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

log = logging.getLogger(__name__)

CHOICES = ("device", "model", "optimizer", "data")


def write_hparams(folder: Path, config: DictConfig, choices: Mapping[str, str], result: Result, monitor: str) -> None:
    """Adds a run's line in HPARAMS to its event file: `lr` and choices against the objective and all that was logged.

    HPARAMS takes metrics that are numbers, and of a run the first line that it finds. So the verdict, a word, stands
    among the hyperparameters, and the line is written when the run has ended: after its last checkpoint, so that
    resuming takes it out of the file (`rewind_event_files`), and the new end writes another.
    The objective and `excess_loss` are those of the last weights; of the other metrics the tab shows the last value of
    their curves. A run without an event file has no line; what cannot be written is warned of.

    Args:
        folder: The run's, whose loggers are closed.
        config: As composed.
        choices: Hydra's option of each group.
        result: How the run ended.
        monitor: The objective's tag, which stands first.
    """
    file = max(folder.glob(EVENT_FILES), key=lambda file: file.stat().st_mtime, default=None)
    if not file:
        return
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.summary import hparams

    line = {"lr": config.get("lr"), **{name: choices.get(name) for name in CHOICES}}
    line = {name: value for name, value in line.items() if value is not None}
    metrics = {monitor: result.metrics.get(monitor), "excess_loss": result.excess_loss}
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items() if value is not None]
    tags = dict.fromkeys([*(value.tag for value in values), *result.metrics], 0.0)
    experiment, *session = hparams({**line, "verdict": result.verdict or result.status}, tags)
    summaries = [_in_sight(experiment), *session, Summary(value=values)]
    events = [Event(wall_time=time.time(), step=result.num_optimizer_steps, summary=each) for each in summaries]
    try:
        with file.open("ab") as stream:
            stream.write(encoded(events))
    except OSError as error:
        log.warning("Cannot write the run's line for HPARAMS: %s", error)


def _in_sight(experiment: "Summary") -> "Summary":
    """Marks what must be seen: the tab begins with five columns, those said to differ first; `data` can wait."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name != "data"
    plugin.content = data.SerializeToString()
    return experiment
