import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome

Script = Callable[..., Outcome]


def test_a_sweep_ends_with_its_report_and_the_script_rebuilds_it(script: Script, tmp_path: Path) -> None:
    fast = ("trainer.max_epochs=2", "callbacks=none", "hydra.sweep.dir=outputs/sweeps/rates")
    swept = script("train", "-m", "lr=0.01,0.1", *fast)
    assert swept.code == 0, swept.err
    sweep = tmp_path / "outputs" / "sweeps" / "rates"
    files = [sweep / name for name in ("sweep.csv", "learning_rate.png", "report.html")]
    contents = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    older = tmp_path / "outputs" / "sweeps" / "zzz"  # a later name, an earlier time
    older.mkdir()
    (older / "multirun.yaml").touch()
    os.utime(older / "multirun.yaml", (1, 1))
    rebuilt = script("report")
    assert rebuilt.code == 0, rebuilt.err
    assert [file.read_bytes() for file in files] == contents
    table = rebuilt.out.splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["0.1", "completed"], ["0.01", "completed"]]
    assert swept.out.splitlines()[-len(table) :] == [
        line.replace("outputs/", f"{tmp_path}/outputs/") if str(tmp_path) in swept.out.splitlines()[-1] else line
        for line in table
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: A sweep's folder must be given, got none, and there is none below outputs/sweeps."),
        (
            ("nowhere",),
            "error: A sweep's folder must be given, such as outputs/sweeps/…, got 'nowhere': no such folder.",
        ),
        ((".",), "error: A sweep's folder must hold a folder for each job, got '.': no job in it."),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(script: Script, arguments: tuple[str, ...], message: str) -> None:
    ended = script("report", *arguments)
    assert (ended.code, ended.out, ended.err.strip()) == (1, "", message)
