import os
import re
import subprocess

from tests.conftest import ROOT

# Under `make test` make would take itself for a child, and say so.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def test_help_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout
    targets = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {line.split()[0] for line in shown.splitlines()} == set(targets)
    assert all(len(line.split()) > 1 for line in shown.splitlines())


def test_an_old_python_is_refused_with_the_way_out(tmp_path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    ended = subprocess.run(
        ["make", "install", f"PYTHON={old}", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    assert "needs Python 3.11 or newer, got Python 3.9.1" in ended.stdout
    assert "PYTHON=python3.12 make" in ended.stdout
    assert not (tmp_path / "venv").exists()


def test_the_dashboard_listens_on_this_machine_alone() -> None:
    command = ["make", "-n", "dashboard"]
    told = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert re.search(r"tensorboard --logdir outputs --host 127\.0\.0\.1$", told.stdout, re.MULTILINE)
