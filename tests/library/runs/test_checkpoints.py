import errno
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from downslope.runs.checkpoints import (
    SafeCheckpointIO,
    UnreadableCheckpointError,
    keep_previous,
    load_checkpoint,
    newest_checkpoint,
    write_checkpoint,
)


def checkpoint(step: int) -> dict[str, Any]:
    lists: dict[str, Any] = {name: [] for name in ("processes", "optimizers", "schedulers", "settings")}
    progress = {"batch": 0, "seconds": 0.0, "model": "Line", "metrics": {}, "event_files": {}, **lists}
    state = {"state_dict": {"weight": torch.arange(1000.0) + step}, "loops": {}, "callbacks": {}}
    return {"global_step": step, **state, "optimizer_states": [], "lr_schedulers": [], "progress": progress}


def test_torch_reads_the_file_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(checkpoint(3), tmp_path / "last.ckpt")
    read = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert read["global_step"] == 3
    assert torch.equal(read["state_dict"]["weight"], torch.arange(1000.0) + 3)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    write_checkpoint({"weight": torch.ones(2)}, file)
    data = file.read_bytes()
    for place in range(0, 8 * len(data), 97):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(UnreadableCheckpointError, match=r"checksum"):
            load_checkpoint(file)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_is_not_whole_is_noticed(tmp_path: Path, share: float) -> None:
    file = tmp_path / "last.ckpt"
    write_checkpoint(checkpoint(1), file)
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(UnreadableCheckpointError, match=r"last\.ckpt .* it is incomplete, or Downslope did not"):
        load_checkpoint(file)


def test_the_newest_good_one_is_taken_and_the_log_says_what_was_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    write_checkpoint(checkpoint(5), folder / "last.ckpt")
    keep_previous(folder / "last.ckpt")
    write_checkpoint(checkpoint(9), folder / "last.ckpt")
    assert newest_checkpoint(tmp_path)[0].name == "last.ckpt"
    (folder / "last.ckpt").write_bytes(b"")
    (folder / "last.ckpt.partial").write_bytes(b"PK")
    with caplog.at_level(logging.WARNING):
        file, read = newest_checkpoint(tmp_path)
    assert (file.name, read["global_step"]) == ("previous.ckpt", 5)
    assert "last.ckpt cannot be read as a checkpoint: it has no checksum" in caplog.text
    assert "last.ckpt.partial was being written" in caplog.text
    write_checkpoint({"global_step": 5}, folder / "previous.ckpt")
    with pytest.raises(ValueError, match=r"`resume` must .*previous\.ckpt holds weights that can be used, but not"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["global_step", "loops", "callbacks", "lr_schedulers", "progress.processes"])
@pytest.mark.parametrize("value", [None, "x", -1.5, ...])
def test_one_that_lacks_what_is_resumed_from_is_passed_over_by_name(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "checkpoints").mkdir()
    spoilt = checkpoint(5)
    *parents, last = key.split(".")
    holder = spoilt[parents[0]] if parents else spoilt
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    write_checkpoint(spoilt, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=rf"last\.ckpt does not hold what a run saves: '{last}' is "):
        newest_checkpoint(tmp_path)
    write_checkpoint(checkpoint(4), tmp_path / "checkpoints" / "previous.ckpt")
    assert newest_checkpoint(tmp_path)[1]["global_step"] == 4


def test_the_previous_one_stays_where_files_cannot_have_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        keep_previous(tmp_path / "last.ckpt")
        write_checkpoint(checkpoint(step), tmp_path / "last.ckpt")
    assert [load_checkpoint(tmp_path / f"{name}.ckpt")["global_step"] for name in ("previous", "last")] == [2, 3]


WRITER = """
import resource, signal, sys, torch
from pathlib import Path
from typing import Any
from downslope.runs.checkpoints import write_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
write_checkpoint({"weight": torch.zeros(100_000)}, Path(sys.argv[1]))
"""


def test_a_disk_that_is_full_leaves_the_last_one(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    write_checkpoint(checkpoint(1), file)
    ended = subprocess.run([sys.executable, "-c", WRITER, str(file)], capture_output=True, text=True, check=False)
    assert "OSError" in ended.stderr
    assert load_checkpoint(file)["global_step"] == 1
    assert [each.name for each in file.parent.iterdir()] == ["last.ckpt"]


def test_a_process_that_cannot_write_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        plugin = SafeCheckpointIO()
        plugin.save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert plugin.error is not None
    assert plugin.error.errno == errno.EFBIG
    plugin.save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    assert plugin.error is None
