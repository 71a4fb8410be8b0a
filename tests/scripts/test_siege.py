import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import attacks
import pytest
import siege

from downslope.runs import trust
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the siege forks")


def outcome(only: str, quick: bool = False, command: str = "") -> Counter[str]:
    trials = [each for each in siege.chosen(only, quick) if command in each[1]]
    assert trials
    return siege.siege(trials, seed=0, jobs=1)


def test_a_short_siege_comes_to_nothing() -> None:
    assert outcome("", quick=True) == {}


def test_a_whole_siege_has_more_than_150_folders() -> None:
    names = [attack.name for attack in attacks.attacks()]
    assert len(names) == len(set(names)) > 150


@pytest.mark.slow  # by a name that is not on Hydra's own list of those that it never calls, as os.system is
def test_a_trust_check_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_check_target", lambda *_: None)
    assert outcome("names: evil.Model as model", command="evaluate")["code"]


@pytest.mark.slow
def test_links_that_are_followed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("resuming", "stored"):
        monkeypatch.setattr(f"downslope.runs.{module}.check_regular", lambda _: None)
    monkeypatch.setattr("downslope.runs.log.open_regular", lambda path, flags: os.open(path, flags))
    assert outcome("links: train.log moved", command="resume")["touched"]


@pytest.mark.slow
def test_a_folder_elsewhere_that_is_written_into_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downslope.launch.gate.check_inside", lambda *_: None)
    assert outcome("paths: callbacks.checkpoints.folder absolute", command="resume")["touched"]


def test_each_promise_names_a_test_that_is_there() -> None:
    promised = re.findall(r"test_\w+(?!\.py)\b(?!\.)", (ROOT / "SECURITY.md").read_text())
    there = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(promised) > 10
    assert [name for name in promised if f"def {name}(" not in there] == []


def test_a_formula_and_markup_in_a_report_are_noticed(tmp_path: Path) -> None:
    rows: list[Any] = [f'"{name}",completed\n' for name in siege.JOBS]
    (tmp_path / "report.html").write_text("")
    (tmp_path / "sweep.csv").write_text("".join(rows))
    assert siege.loss(tmp_path) == ""
    (tmp_path / "sweep.csv").write_text("".join([*rows, "=1\n"]))
    assert siege.loss(tmp_path) == "a formula in sweep.csv"
    (tmp_path / "sweep.csv").write_text("".join(rows[1:]))
    assert siege.loss(tmp_path) == f"without {siege.JOBS[0]}"
