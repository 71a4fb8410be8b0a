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

from tests.conftest import ROOT, Outcome, read_json

TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py")]
WITH_PICTURES = ("hydra.run.dir=run", "trainer.max_epochs=20", "callbacks.gradient_monitor.every_n_steps=1")
SHORT = (*WITH_PICTURES, "~callbacks.pictures")


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
    assert re.match(r"WARNING: Cannot write to .* any more, training goes on: .*File too large \(said once", line)
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
    command = [*TRAIN, *WITH_PICTURES, "callbacks.checkpoints.folder=checkpoints"]
    ended = subprocess.run(
        [*alone, f"{mount} && {shlex.join(command)}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "  loss      train " in ended.stdout
    warning, error = ended.stderr.splitlines()  # loggers, log, pictures and HPARAMS; and what is lost
    assert re.match(r"WARNING: Cannot write .*No space left on device \(said once", warning)
    assert re.match(r"error: The result cannot be written to .*result\.json: No space left on device\.", error)
    assert torch.equal(weights(tmp_path, "checkpoints"), undisturbed)


def test_a_result_that_cannot_be_written_is_an_error(script: Callable[..., Outcome]) -> None:
    Path("run/result.json.partial").mkdir(parents=True)
    ended = script("train", *SHORT, "~callbacks.progress")
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("error: The result cannot be written to ")
    assert "  loss      train " in ended.out


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
