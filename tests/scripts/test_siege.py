import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import attacks
import pytest
import siege

from tests.conftest import ROOT

LABORATORY = ROOT / "scripts" / "laboratory"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the siege forks")


def laboratory(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, *arguments]
    return subprocess.run(program, cwd=LABORATORY, capture_output=True, text=True, timeout=300, check=False)


def test_a_short_siege_comes_to_nothing() -> None:
    ended = laboratory("siege.py", "--quick", "--seed", "0", "--jobs", "1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"tried {len(siege.QUICK)}, code 0" in ended.stdout


def test_a_whole_siege_has_more_than_150_folders() -> None:
    names = [attack.name for attack in attacks.attacks()]
    assert len(names) == len(set(names)) > 150


# What a guard that is gone lets through, in a process of its own: what else a test's process has imported, and which
# handlers its log has by then, must not decide whether an attack comes through.
PLANTED = {
    # by a name that is not on Hydra's own list of those that it never calls, as os.system is
    "trust": ("names: evil.Model as model", "evaluate", "code", "trust._check_target = lambda *_: None"),
    "links": (
        "links: train.log moved",
        "resume",
        "touched",
        "resuming.check_regular = stored.check_regular = lambda _: None; log.open_regular = os.open",
    ),
    "paths": (
        "paths: callbacks.checkpoints.folder absolute",
        "resume",
        "touched",
        "gate.check_inside = lambda *_: None",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("guard", PLANTED)
def test_a_guard_that_is_gone_is_noticed(guard: str) -> None:
    attack, command, harm, planted = PLANTED[guard]
    lines = (
        "import os, siege",
        "from downslope.launch import gate",
        "from downslope.runs import log, resuming, stored, trust",
        planted,
        f"trials = [each for each in siege.chosen({attack!r}, quick=False) if each[1] == {command!r}]",
        "print(f'harms {dict(siege.siege(trials, seed=0, jobs=1))}')",
    )
    ended = laboratory("-c", "\n".join(lines))
    harms = ast.literal_eval(ended.stdout.partition("harms ")[2] or "{}")
    assert harms.get(harm), ended.stdout + ended.stderr


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
