"""`result.json` comes back as it was written, or is refused by the name of what no run writes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from downslope.runs.result import Result, read_result


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    result = Result(
        status="completed", verdict="converged", evidence={"sentence": "so", "deep": [1, {"a": None}]},
        learning_rate=0.1, monitor="val/accuracy", mode="max", objective=0.75, metrics={"val/loss": 0.1 + 0.2},
        num_optimizer_steps=3, seconds=1.5, overrides=["lr=0.1"], seed=2**32 - 1, versions={"torch": "2"},
    )  # fmt: skip
    result.write(tmp_path)
    assert read_result(tmp_path) == result
    assert read_result(tmp_path / "nowhere") is None


def test_what_is_not_finite_is_nothing_when_it_comes_back(tmp_path: Path) -> None:
    Result(status="diverged", objective=math.inf, metrics={"val/loss": math.nan, "val/r2": 0.5}).write(tmp_path)
    found = read_result(tmp_path)
    assert found
    assert (found.objective, found.metrics) == (None, {"val/r2": 0.5})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("status", "won"),
        ("status", ["completed"]),
        ("verdict", ["converged"]),
        ("seconds", None),
        ("seconds", "1"),
        ("objective", 10**400),
        ("learning_rate", True),
        ("metrics", {"val/loss": "0.1"}),
        ("metrics", {"val/loss": 10**100}),
        ("metrics", 3),
        ("num_optimizer_steps", 0.5),
        ("overrides", "lr=1"),
        ("overrides", [1]),
        ("error", {"message": 1}),
        ("unheard", 1),
    ],
)
def test_what_no_run_writes_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"status": "completed", name: value}))
    with pytest.raises(ValueError, match=f"result.json has a `{name}` that no run writes"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\x00", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b'{"status": ' + b"9" * 5000],
)
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"result\.json"):
        read_result(tmp_path)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
def test_a_number_that_is_not_finite_is_none_of_ours(tmp_path: Path, number: bytes) -> None:
    (tmp_path / "result.json").write_bytes(b'{"status": "completed", "seconds": ' + number + b"}")
    with pytest.raises(ValueError, match="`seconds`"):
        read_result(tmp_path)


def test_no_text_keeps_what_steers_a_terminal(tmp_path: Path) -> None:
    evil = {"status": "failed", "verdict": "\u001b[2J", "error": {"message": "\ud800 \u202e\n"}}
    (tmp_path / "result.json").write_text(json.dumps(evil))
    found = read_result(tmp_path)
    assert found
    assert (found.verdict, found.error) == ("?[2J", {"message": "? ?\n"})
