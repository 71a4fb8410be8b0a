import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from downslope.runs.checkpoints import load_checkpoint, write_checkpoint
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "only",
    [
        "manual, schedule by step",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("accumulation", "foreign, 2 workers")),
    ],
)
def test_a_killed_run_that_is_gone_on_with_ends_in_the_same_bits(only: str) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "laboratory" / "chaos.py"),
        "--kills",
        "3",
        "--seed",
        "5",
        "--commands",
        "0",
    ]
    ended = subprocess.run([*command, "--only", only], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (counts,) = re.findall(r"^killed (\d+), resumed (\d+), bit-equal (\d+)$", ended.stdout, flags=re.MULTILINE)
    assert int(counts[0]) >= 3
    assert counts[0] == counts[1] == counts[2]


def test_one_bit_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "laboratory")
    from chaos import differences

    for name, weight in {"run": 1.0, "reference": 1.0000001}.items():
        progress = {"seconds": 1.0, "event_files": {}, "batch": 0}
        content = {"state_dict": {"weight": torch.tensor([weight])}, "loops": {}, "progress": progress}
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        write_checkpoint(content, tmp_path / name / "checkpoints" / "last.ckpt")
    assert differences(tmp_path / "run", tmp_path / "reference") == ["last.ckpt: state_dict"]
    assert differences(tmp_path / "run", tmp_path / "run") == []
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
