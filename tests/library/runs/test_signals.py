import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from downslope.runs.checkpoints import load_checkpoint
from downslope.runs.signals import ECHO
from tests.conftest import ROOT, Outcome, read_json, run_process
from tests.witness import until

Start = Callable[..., "subprocess.Popen[str]"]
LAST = "checkpoints/last.ckpt"

TRUST = "trust=[tests.witness.Witness,{}]"  # and the folder that it writes into


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a run, in a process group of its own, that a witness holds after a step."""
    processes = []

    def run(*overrides: str, step: int, write: bool = False, **environment: str) -> "subprocess.Popen[str]":
        witness = {"_target_": "tests.witness.Witness", "folder": tmp_path, "step": step, "write": write}
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "hydra.run.dir=run", "device=cpu", *overrides]
        process = subprocess.Popen(
            [*command, *(f"+callbacks.witness.{key}={value}" for key, value in witness.items())],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        until(lambda: (tmp_path / "step").exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process

    yield run
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def step_of(folder: Path) -> int:
    """Of the checkpoint that a run goes on from; it is whole, or this raises."""
    step: int = load_checkpoint(folder / "run" / LAST)["global_step"]
    return step


@pytest.mark.parametrize("write", [False, True], ids=["in a long step", "in a checkpoint"])
def test_a_second_interrupt_stops_at_once_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, start: Start, write: bool
) -> None:
    process = start("callbacks=checkpoints", "callbacks.checkpoints.every_n_steps=2", step=5, write=write)
    process.send_signal(signal.SIGINT)
    if write:
        (tmp_path / "step.go").touch()
        until((tmp_path / "write").exists)
    time.sleep(2 * ECHO)  # two that come at once are one
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)  # the witness would wait for 120 seconds
    assert (process.returncode, err) == (130, "")
    assert "stopped   at step 5, not saved" in out
    assert step_of(tmp_path) == 4
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"


TIDYING = """
import time
from downslope.runs import signals
signals.ECHO = 2
signals.exit_on_signals()
try:
    print("here", flush=True)
    time.sleep(120)
finally:
    print("tidying", flush=True)
    time.sleep(120)
"""


def test_a_signal_passed_on_twice_is_one_and_a_second_does_not_wait_for_the_tidying() -> None:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", TIDYING], **streams) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "tidying\n"
        process.send_signal(signal.SIGINT)
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


@pytest.mark.slow
def test_killed_in_a_write_with_the_temporary_folder_on_another_disk_a_run_goes_on_from_the_last_good_checkpoint(
    tmp_path: Path, start: Start, script: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system: /dev/shm")
    settings = ("trainer.max_epochs=3", "~callbacks.pictures", "callbacks.checkpoints.every_n_steps=1")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        process = start(*settings, step=5, write=True, TMPDIR=elsewhere)
        (tmp_path / "step.go").touch()
        until((tmp_path / "write").exists)
        process.kill()
        process.wait()
        assert not list(Path(elsewhere).iterdir())
    assert step_of(tmp_path) == 4
    time.sleep(1)  # event files are read in the order of their names: second, host, process, and this process is older
    ended = script("train", "resume=run", TRUST.format(tmp_path))
    assert ended.code == 0, ended.err
    line = ended.err.strip()
    assert re.fullmatch(
        r"WARNING: Skipped: .*last\.ckpt\.\w{8}\.partial was being written when the run was killed\. "
        r"Resuming from last\.ckpt, step 4\.",
        line,
    )
    assert script("train", "hydra.run.dir=reference", "device=cpu", *settings).code == 0
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from chaos import differences

    # beartype, in this process alone, draws from Python's random numbers, which a checkpoint's progress holds.
    found = differences(tmp_path / "run", tmp_path / "reference")
    assert {each for each in found if not each.endswith("progress")} == set()


HIGH = ("lr=5", "data.batch_size=30", "+callbacks.flight_recorder.every_n_steps=10")


@pytest.mark.filterwarnings("ignore:Diverged")
@pytest.mark.parametrize(("number", "step"), [(signal.SIGKILL, 3), (signal.SIGTERM, 4)])
def test_steps_that_nobody_has_judged_yet_are_not_lost_with_a_signal(
    tmp_path: Path, start: Start, script: Callable[..., Outcome], number: signal.Signals, step: int
) -> None:
    settings = (*HIGH, "callbacks.checkpoints.every_n_steps=2", "~callbacks.pictures")
    process = start(*settings, step=step)
    process.send_signal(number)
    (tmp_path / "step.go").touch()
    out, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert script("train", "resume=run", TRUST.format(tmp_path)).code == 3
    else:
        assert process.returncode == 3, out + err  # it stops, and not because of the signal
    assert script("train", "hydra.run.dir=reference", "device=cpu", *settings).code == 3
    here, there = (tmp_path / name for name in ("run", "reference"))
    assert (here / "flight_record.json").read_bytes() == (there / "flight_record.json").read_bytes()
    assert read_json(here)["status"] == "diverged"
    assert read_json(here)["metrics"] == read_json(there)["metrics"]
    saved = [load_checkpoint(file) for file in (here / "checkpoints").glob("*.ckpt")]
    assert saved
    assert all(value.isfinite().all() for each in saved for value in each["state_dict"].values())


@pytest.mark.slow
def test_a_run_that_is_resumed_begins_a_csv_table_of_its_own_at_its_checkpoint(
    tmp_path: Path, start: Start, script: Callable[..., Outcome]
) -> None:
    settings = ("logger=csv", "+logger.csv.flush_logs_every_n_steps=1", "trainer.max_epochs=3", "~callbacks.pictures")
    often = ("callbacks.checkpoints.every_n_steps=5", "callbacks.gradient_monitor.every_n_steps=1")
    process = start(*settings, *often, step=14)
    process.kill()
    process.wait()
    assert step_of(tmp_path) == 10
    first, second = (tmp_path / "run" / "csv" / f"version_{version}" / "metrics.csv" for version in (0, 1))
    before = first.read_bytes()
    assert script("train", "resume=run", TRUST.format(tmp_path)).code == 0
    assert script("train", "hydra.run.dir=reference", "device=cpu", *settings, *often).code == 0
    assert first.read_bytes() == before
    whole = cells(tmp_path / "reference" / "csv" / "version_0" / "metrics.csv")
    kept = [cell for cell in cells(first) if int(cell[0]) < 10]
    assert sorted([*kept, *(cell for cell in cells(second) if int(cell[0]) >= 10)]) == whole
    assert set(cells(second)) <= set(whole)


def cells(table: Path) -> list[tuple[str, str, str]]:
    """Step, column and value of every cell; the order of the rows is that of writing, which is by the clock."""
    with table.open(newline="") as stream:
        return sorted(
            (row["step"], key, value) for row in csv.DictReader(stream) for key, value in row.items() if value
        )


TWO = (
    "trainer=ddp",
    "device=cpu",
    "trainer.devices=2",
    "trainer.max_epochs=3",
    "data.batch_size=32",
    "~callbacks.pictures",
)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    ended = run_process(folder, "train", "hydra.run.dir=run", *TWO)
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


def living(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [row[2] for row in rows if int(row[0]) == group and not row[1].startswith("Z")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "send", "code"), [(signal.SIGTERM, os.kill, 143), (signal.SIGINT, os.killpg, 130)], ids=["main", "group"]
)
def test_two_processes_stop_at_the_same_step_and_go_on_to_the_same_bits(
    tmp_path: Path,
    start: Start,
    never_stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    send: Callable[[int, int], None],
    code: int,
) -> None:
    process = start(*TWO, step=8)
    send(process.pid, number)
    (tmp_path / "step.go").touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert "stopped   at step 8, saved" in out
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["8", "8"]
    until(lambda: not living(process.pid))
    assert step_of(tmp_path) == 8
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    ended = run_process(tmp_path, "train", "resume=run", TRUST.format(tmp_path), PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from chaos import differences

    assert differences(tmp_path / "run", never_stopped) == []
