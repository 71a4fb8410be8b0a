"""TensorBoard's HPARAMS tab: what a run was asked for, against what came of it."""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from downslope.logs.event_files import records
from downslope.runs.result import Result

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

log = logging.getLogger(__name__)

PREFIX = b"_hparams_/"  # of the tags that the tab reads
CHOICES = ("device", "model", "optimizer", "data")


def write_hparams(folder: Path, config: DictConfig, choices: dict[str, str], result: Result) -> None:
    """Adds a run's line in HPARAMS to its event file: `lr` and choices against `val/loss` and `excess_loss`.

    HPARAMS takes metrics that are numbers and, of a run, only the first line it finds. So the verdict, a word, stands
    among the hyperparameters, and the line is written when the run has ended and its logger is closed; a run that was
    resumed loses the line of its former end.
    `val/loss` is the last weights', in float64, at the last step. A run without an event file has no line; what cannot
    be written is warned of.

    Args:
        folder: The run's.
        config: As composed.
        choices: Hydra's option of each group.
        result: How the run ended.
    """
    files = sorted(folder.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    if not files:
        return
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard.summary import hparams

    asked = {"lr": float(config.lr), **{name: str(choices.get(name)) for name in CHOICES}}
    metrics = {"val/loss": result.metrics.get("val/loss"), "excess_loss": result.excess_loss}
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items() if value is not None]
    columns = {**asked, "verdict": result.verdict or result.status}
    experiment, *session = hparams(columns, dict.fromkeys(metrics, 0.0))
    summaries = [_in_sight(experiment), *session, Summary(value=values)]
    try:
        for former in files[:-1]:
            _forget_line(former)
        with files[-1].open("ab") as stream:
            writer = RecordWriter(stream)
            for summary in summaries:
                event = Event(wall_time=files[-1].stat().st_mtime, step=result.num_optimizer_steps, summary=summary)
                writer.write(event.SerializeToString())
            writer.flush()
    except OSError as error:
        log.warning("Cannot write the run's line for HPARAMS: %s", error)


def _forget_line(file: Path) -> None:
    """Leaves a former end's line out of an event file."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = file.read_bytes()
    if PREFIX not in content:
        return
    beside = file.with_name("events.tmp")  # not a name that TensorBoard reads
    with beside.open("wb") as stream:
        writer = RecordWriter(stream)
        for record in records(content):
            if PREFIX not in record:
                writer.write(record)
        writer.flush()
    shutil.copystat(file, beside)
    beside.replace(file)


def _in_sight(experiment: "Summary") -> "Summary":
    """Marks what must be seen: the tab begins with five columns, those said to differ first; `data` can wait."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name != "data"
    plugin.content = data.SerializeToString()
    return experiment
