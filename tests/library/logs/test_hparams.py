from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from downslope.logs.event_files import EVENT_FILES
from downslope.logs.hparams import write_hparams
from downslope.logs.tensorboard import rewind_event_files
from tests.conftest import Outcome, read_json, scalars
from tests.library.sweeps.conftest import write_curves

ASKED = {"lr": 0.1, "device": "cpu", "model": "digits", "verdict": "too_slow", "data": None}
CAME = {"val/accuracy": None, "train/loss": None}


def plugin_data(run: Path, tag: str) -> HParamsPluginData:
    """What the plugin finds in a run."""
    events = EventAccumulator(str(run))
    events.Reload()
    return HParamsPluginData.FromString(events.PluginTagToContent("hparams")[f"_hparams_/{tag}"])


def line(run: Path) -> dict[str, object]:
    hparams = plugin_data(run, "session_start_info").session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}


def columns(run: Path) -> list[str]:
    return [info.name.tag for info in plugin_data(run, "experiment").experiment.metric_infos]


def test_the_line_holds_what_was_asked_for_against_what_was_logged(tmp_path: Path) -> None:
    write_curves(tmp_path, {"train/loss": {7: 0.5}, "val/accuracy": {5: 0.75}})
    write_hparams(tmp_path, ASKED, CAME, step=7)
    assert line(tmp_path) == {name: value for name, value in ASKED.items() if name != "data"}
    assert columns(tmp_path) == ["val/accuracy", "train/loss"]
    assert scalars(tmp_path, "val/accuracy") == [(5, 0.75)]
    assert scalars(tmp_path, "train/loss") == [(7, 0.5)]


def test_what_has_no_curve_is_written_once(tmp_path: Path) -> None:
    write_curves(tmp_path, {})
    write_hparams(tmp_path, ASKED, {**CAME, "excess_loss": 0.5}, step=7)
    assert columns(tmp_path) == ["val/accuracy", "train/loss", "excess_loss"]
    assert scalars(tmp_path, "excess_loss") == [(7, 0.5)]


def test_a_resumed_run_shows_its_last_verdict_alone_and_keeps_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for second, (step, verdict) in enumerate({7: "too_slow", 9: "converged"}.items()):
        monkeypatch.setattr("time.time", lambda now=1_700_000_000 + second: now)
        write_curves(tmp_path, {"train/loss": {step: 1.0}})
        lengths = {file.name: file.stat().st_size for file in tmp_path.iterdir()}  # as the last checkpoint knows them
        write_hparams(tmp_path, {"verdict": verdict}, CAME, step=step)
        if second == 0:
            assert line(tmp_path)["verdict"] == "too_slow"
            rewind_event_files(tmp_path, lengths)
    assert line(tmp_path)["verdict"] == "converged"
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert content.count(b"_hparams_/session_start_info") == 1
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [7, 9]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_has_ended_and_is_resumed_has_one_line(script: Callable[..., Outcome], tmp_path: Path) -> None:
    quick = ("device=cpu", "callbacks=checkpoints")
    assert script("train", "trainer.max_epochs=1", "hydra.run.dir=run", *quick).code == 0
    assert script("train", "resume=run", "resume_override=[trainer.max_epochs]", "trainer.max_epochs=2").code == 0
    run = tmp_path / "run"
    assert b"".join(file.read_bytes() for file in run.glob(EVENT_FILES)).count(b"_hparams_/session_start_info") == 1
    step, loss = scalars(run, "val/loss")[-1]
    assert (step, loss) == (read_json(run)["num_optimizer_steps"], pytest.approx(read_json(run)["metrics"]["val/loss"]))


def test_a_run_without_an_event_file_gets_none(tmp_path: Path) -> None:
    write_hparams(tmp_path, ASKED, CAME, step=7)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "events.out.tfevents.1.a.b.0").mkdir()
    write_hparams(tmp_path, ASKED, CAME, step=7)
    assert "Cannot write the run's line for HPARAMS" in caplog.text
