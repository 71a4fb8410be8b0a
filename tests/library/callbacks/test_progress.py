import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Outcome


@pytest.mark.slow
def test_a_terminal_shows_one_bar_with_loss_and_gradient_norm(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "trainer.max_epochs=40"],
        cwd=tmp_path,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                shown += os.read(master, 65_536)
            except OSError:  # the other end has closed
                break
        elif process.poll() is not None:
            break
    assert process.wait(timeout=120) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"epoch \d+/40 ━+.* \d+/240 steps +loss \d\.\d+ +‖gradient‖ \d", text)
    assert re.search(r"epoch 40/40 ━+ 240/240 steps", text)
    assert "Traceback" not in text


def test_plain_text_elsewhere(script, tmp_path: Path) -> None:
    outcome: Outcome = script(
        "train", "+callbacks.progress.line_every_n_seconds=0", "trainer.max_epochs=2", "model=manual"
    )
    assert outcome.code == 0
    lines = [line for line in outcome.err.splitlines() if "epoch" in line]
    assert re.fullmatch(r"  epoch 2/2  12/12 steps  loss \d\.\d+  ‖gradient‖ [\d.]+  [a-z_]+", lines[-1])


@pytest.mark.parametrize("model", ["automatic", "manual"])
def test_a_short_run_into_a_file_says_nothing(script, model: str) -> None:
    assert script("train", "trainer.max_epochs=2", f"model={model}").err == ""
