import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from downslope.runs.whole_files import PARTIAL, whole_file

WRITER = """
import os, sys
from pathlib import Path
from downslope.runs.whole_files import whole_file
stop = sys.argv[2]
fsync, replace = os.fsync, Path.replace
def die(*_): os.kill(os.getpid(), 9)
if stop == "before the rename": Path.replace = die
if stop == "before the flush": os.fsync = die
with whole_file(Path(sys.argv[1])) as stream:
    stream.write(b"new, the first half")
    if stop == "in the middle": stream.flush(); die()
    stream.write(b"new, the second half")
"""


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    with whole_file(file) as stream:
        stream.write(b"new")
        assert not file.exists()
    assert file.read_bytes() == b"new"
    assert [each.name for each in file.parent.iterdir()] == ["file.json"]


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "gone" / "file.json"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", ["in the middle", "before the flush", "before the rename"])
def test_a_process_that_is_killed_leaves_the_old_file(tmp_path: Path, stop: str) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(b"old")
    ended = subprocess.run([sys.executable, "-c", WRITER, str(file), stop], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert file.read_bytes() == b"old"
    (left,) = [each.name for each in tmp_path.iterdir() if each != file]
    assert left.startswith("file.json.")
    assert left.endswith(PARTIAL)
    with whole_file(file) as stream:  # what was left behind is in nobody's way
        stream.write(b"new")
    assert file.read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with whole_file(tmp_path / "file.json") as stream:
            stream.write(b"new")
            raise error

    (tmp_path / "file.json").write_bytes(b"old")
    with pytest.raises(error):
        write()
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file.json", b"old")]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flush(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        order.append("folder" if is_folder else "content")
        assert is_folder or os.fstat(handle).st_size == 3
        fsync(handle)

    def rename(self: Path, target: Path) -> Path:
        order.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    with whole_file(tmp_path / "file.json") as stream:
        stream.write(b"new")
    assert order == ["content", "name", "folder"]
