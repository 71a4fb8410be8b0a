"""What a stranger's folder holds is opened only where it is a regular file, and read as plain values."""

import os
from pathlib import Path

import pytest

from downslope.runs.plain_files import MAX_DEPTH, check_regular, read_bytes, read_yaml


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "folder", "link", "dangling"):
        with pytest.raises(ValueError, match=f"{name} must be a regular file"):
            read_bytes(tmp_path / name)
    assert read_bytes(tmp_path / "nowhere") is None
    assert read_bytes(tmp_path / "there") == b"1"
    with pytest.raises(ValueError, match="at most 0 bytes"):
        read_bytes(tmp_path / "there", most=0)


def test_a_sparse_file_of_ten_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "result.json").open("wb") as stream:
        stream.truncate(10 * 2**30)
    with pytest.raises(ValueError, match="at most"):
        read_bytes(tmp_path / "result.json")


@pytest.mark.parametrize(
    "content",
    [
        b"lr: !!binary aGVsbG8=",
        b"lr: !!python/object/apply:os.system ['true']",
        b"!!set {a, b}",
        b"lr: &a 1\nseed: *a",
        b"a: &a [*a]",
        b"[" * (MAX_DEPTH + 1),
        b"[" * 200_000,
        b"- " * 200_000,
        b"\xff\xfe\x00",
        b"a: [",
        b"a: \x1b[2J",
    ],
)
def test_yaml_is_plain_values_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.yaml"):
        read_yaml(tmp_path / "file.yaml")


def test_plain_yaml_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("lr: 0.1\nname: größer\nlist: [1, null, true]\n")
    assert read_yaml(tmp_path / "file.yaml") == {"lr": 0.1, "name": "größer", "list": [1, None, True]}
    assert read_yaml(tmp_path / "nowhere.yaml") is None


@pytest.mark.parametrize("name", ["link", "deep/link", "pipe"])
def test_a_folder_with_a_link_or_a_pipe_in_it_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "file").touch()
    check_regular(tmp_path / "run")
    evil = tmp_path / "run" / name
    os.mkfifo(evil) if name == "pipe" else evil.symlink_to(tmp_path)
    with pytest.raises(ValueError, match=f"{name} must be a file or a folder"):
        check_regular(tmp_path / "run")


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link must be a file or a folder"):
        check_regular(tmp_path / "link")
