from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from downslope.logs.hparams import write_hparams
from downslope.runs.result import Result
from tests.conftest import scalars
from tests.library.sweeps.conftest import write_curves

CONFIG = OmegaConf.create({"lr": 0.1})
CHOICES = {"device": "cpu", "model": "manual", "optimizer": "sgd", "data": "diabetes", "hydra/launcher": "basic"}
RESULT = Result(status="completed", metrics={"val/loss": 0.25}, excess_loss=0.5, num_optimizer_steps=7)


def session(run: Path) -> dict[str, object]:
    """The run's line as the plugin finds it."""
    events = EventAccumulator(str(run))
    events.Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}


def test_the_line_holds_rate_choices_metrics_and_the_verdict(tmp_path: Path) -> None:
    write_curves(tmp_path, {"val/loss": {7: 0.75}})
    write_hparams(tmp_path, CONFIG, CHOICES, RESULT)
    line = {"lr": 0.1, "device": "cpu", "model": "manual", "optimizer": "sgd", "data": "diabetes"}
    assert session(tmp_path) == {**line, "verdict": "completed"}
    assert scalars(tmp_path, "val/loss")[-1] == (7, 0.25)
    assert scalars(tmp_path, "excess_loss") == [(7, 0.5)]


def test_a_resumed_run_shows_its_last_verdict_alone_and_keeps_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for second, (step, verdict) in enumerate({7: "too_slow", 9: "converged"}.items()):
        monkeypatch.setattr("time.time", lambda now=1_700_000_000 + second: now)
        write_curves(tmp_path, {"train/loss": {step: 1.0}})
        write_hparams(tmp_path, CONFIG, CHOICES, Result(**{**vars(RESULT), "verdict": verdict}))
    assert session(tmp_path)["verdict"] == "converged"
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert content.count(b"_hparams_/session_start_info") == 1
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [7, 9]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_without_an_event_file_gets_none(tmp_path: Path) -> None:
    write_hparams(tmp_path, CONFIG, CHOICES, RESULT)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "events.out.tfevents.1.a.b.0").mkdir()
    write_hparams(tmp_path, CONFIG, CHOICES, RESULT)
    assert "Cannot write the run's line for HPARAMS" in caplog.text
