import os
import pty
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import Logger

from downslope.logs.non_raising import non_raising_logger
from downslope.logs.tensorboard import TensorBoard, write_scalars
from downslope.runs.run import Run
from tests.conftest import ROOT, Outcome, read_json, scalars

TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py")]
WITH_PICTURES = ("hydra.run.dir=run", "trainer.max_epochs=20", "callbacks.gradient_monitor.every_n_steps=1")
SHORT = (*WITH_PICTURES, "~callbacks.pictures")


class Memory(Logger):
    """Keeps values that are numbers; another service's client has errors of its own."""

    name = version = None

    def __init__(self, error: type[Exception] = RuntimeError, is_down: bool = False) -> None:
        super().__init__()
        self.error, self.is_down = error, is_down
        self.values: list[tuple[str, float, int | None]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self.is_down:
            raise self.error("the service is down")
        for tag, value in metrics.items():
            if isinstance(value, str):
                raise self.error(f"{value} is no number")
            self.values.append((tag, value, step))

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("error", [TypeError, ValueError, OverflowError, RuntimeError])
def test_a_value_that_cannot_be_written_costs_itself_and_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    logger = non_raising_logger(memory := Memory(error))
    for step in (1, 2):
        logger.log_metrics({"word": "three", "loss": 0.5}, step)
    assert {("loss", 0.5, 1), ("loss", 0.5, 2)} == set(memory.values)
    assert caplog.messages == ["Memory cannot write `word`, which is left out: three is no number"]


def test_a_value_on_its_own_costs_itself(caplog: pytest.LogCaptureFixture) -> None:
    logger = non_raising_logger(memory := Memory(ValueError))
    logger.log_metrics({"word": "three"}, 1)
    logger.log_metrics({"loss": 0.5}, 1)
    assert memory.values == [("loss", 0.5, 1)]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("values", [{"loss": 0.5}, {"loss": 0.5, "accuracy": 0.5}])
@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_logger_that_fails_is_warned_of_once_and_left_alone(
    caplog: pytest.LogCaptureFixture, error: type[Exception], values: dict[str, float]
) -> None:
    logger = non_raising_logger(memory := Memory(error, is_down=True))
    for step in (1, 2):
        logger.log_metrics(values, step)
    memory.is_down = False
    logger.log_metrics(values, 3)
    logger.log_hyperparams({})
    assert memory.values == []
    assert caplog.messages == ["Cannot write to Memory any more; training continues: the service is down"]


def test_a_logger_that_fails_costs_no_other_one(tmp_path: Path) -> None:
    loggers = [Memory(is_down=True), TensorBoard(str(tmp_path)), memory := Memory()]
    trainer = Trainer(logger=loggers, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    write_scalars(trainer, {"loss": 0.5}, 7)
    assert memory.values == [("loss", 0.5, 7)]
    assert scalars(tmp_path, "loss") == [(7, 0.5)]


@pytest.mark.slow
def test_importing_the_loggers_changes_nothing_outside_them() -> None:
    code = """
import logging, threading
from tensorboard.summary.writer import record_writer
import lightning.pytorch.loggers
before = record_writer.masked_crc32c, threading.excepthook, logging.root.handlers[:], logging.root.level
import downslope.logs.hparams, downslope.logs.non_raising, downslope.logs.tensorboard
assert before == (record_writer.masked_crc32c, threading.excepthook, logging.root.handlers, logging.root.level)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def train(folder: Path, *overrides: str, **how: Any) -> subprocess.CompletedProcess[str]:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    command = [*TRAIN, *SHORT, *overrides]
    return subprocess.run(command, cwd=folder, text=True, timeout=120, check=False, **how)


def weights(folder: Path, checkpoints: str = "run/checkpoints") -> torch.Tensor:
    state = torch.load(folder / checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([each.flatten() for each in state.values()])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(folder).returncode == 0
    return weights(folder)


def at_most(num_bytes: int) -> Any:
    """A disk that is full for any file beyond so many bytes: `write` fails with EFBIG."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return limit


@pytest.mark.parametrize("logger", ["tensorboard", "csv"])
def test_a_full_disk_under_a_logger_is_one_warning_and_the_same_bits(
    tmp_path: Path, undisturbed: torch.Tensor, logger: str
) -> None:
    ended = train(tmp_path, f"logger={logger}", "~callbacks.progress", preexec_fn=at_most(60_000))  # a checkpoint fits
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stderr.splitlines()  # HPARAMS cannot be written either
    assert re.match(r"WARNING: Cannot write to .* any more; training continues: .*File too large \(said once", line)
    assert torch.equal(weights(tmp_path), undisturbed)
    assert read_json(tmp_path / "run")["status"] == "completed"


def test_a_disk_that_is_really_full_is_one_warning_and_the_same_bits(tmp_path: Path, undisturbed: torch.Tensor) -> None:
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=64k tmpfs run"
    (tmp_path / "run").mkdir()
    try:
        subprocess.run([*alone, mount], cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nobody may mount a small disk here: {error}")
    command = [*TRAIN, *WITH_PICTURES, "callbacks.checkpoints.folder=checkpoints", "~callbacks.progress"]
    ended = subprocess.run(
        [*alone, f"{mount} && {shlex.join(command)}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "  loss      train " in ended.stdout
    warning, error = ended.stderr.splitlines()  # loggers, log, pictures and HPARAMS; and what is lost
    assert re.match(r"WARNING: .*No space left on device.* \(said once", warning)
    assert re.match(r"error: The result cannot be written to .*result\.json: No space left on device\.", error)
    assert torch.equal(weights(tmp_path, "checkpoints"), undisturbed)


def test_a_result_that_cannot_be_written_is_an_error(
    script: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = Run.collect

    def collect_in_the_way(self: Run, trainer: Any) -> None:
        (self.folder / "result.json").mkdir(exist_ok=True)
        collect(self, trainer)

    monkeypatch.setattr(Run, "collect", collect_in_the_way)
    ended = script("train", *SHORT, "~callbacks.progress")
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("error: The result cannot be written to ")
    assert "  loss      train " in ended.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "streams"),
    [("pipe", ["stdout"]), *((kind, ["stdout", "stderr"]) for kind in ("pipe", "terminal", "closed", "full"))],
)
def test_nobody_listening_changes_nothing(
    tmp_path: Path, undisturbed: torch.Tensor, kind: str, streams: list[str]
) -> None:
    frequency = "every_n_seconds" if kind == "terminal" else "line_every_n_seconds"
    how: dict[str, Any] = {}
    if kind == "closed":
        how["preexec_fn"] = lambda: os.closerange(1, 3)
    elif kind == "full":
        how |= dict.fromkeys(streams, os.open("/dev/full", os.O_WRONLY))
    else:
        mine, other = pty.openpty() if kind == "terminal" else os.pipe()
        os.close(mine)  # a terminal that is hung up, a read end that is closed
        how |= dict.fromkeys(streams, other)
    ended = train(tmp_path, f"+callbacks.progress.{frequency}=0", **how)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in (ended.stderr or "")
    assert torch.equal(weights(tmp_path), undisturbed)
    assert read_json(tmp_path / "run")["status"] == "completed"
