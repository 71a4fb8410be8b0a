from pathlib import Path

import pytest

from downslope.sweeps.curves import read_curves
from tests.conftest import scalars
from tests.library.sweeps.conftest import write_curves

TAGS = frozenset({"val/loss", "train/loss"})
CURVES = {"val/loss": {1: 0.75, 2: 0.5}, "train/loss": {3: float("inf")}, "other": {1: 1.0}}


def test_the_curves_are_those_that_tensorboards_own_reader_finds(tmp_path: Path) -> None:
    write_curves(tmp_path, CURVES)
    curves = read_curves(tmp_path, TAGS)
    assert set(curves) == TAGS
    for tag, curve in curves.items():
        assert list(curve.items()) == scalars(tmp_path, tag)


def test_a_step_written_again_after_a_resume_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for second, value in enumerate((0.75, 0.25)):
        monkeypatch.setattr("time.time", lambda now=1_700_000_000 + second: now)  # an event file is named by it
        write_curves(tmp_path, {"val/loss": {2: value, 3 + second: 1.0}})
    assert read_curves(tmp_path, TAGS) == {"val/loss": {2: 0.25, 3: 1.0, 4: 1.0}}


def test_a_run_without_an_event_file_has_no_curve(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "nowhere", TAGS) == {}
