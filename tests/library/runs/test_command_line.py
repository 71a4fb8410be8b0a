import os

import pytest
from omegaconf import OmegaConf

from downslope.runs.command_line import COMMAND, command_line, typed


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that a script was started in, not pytest's."""
    monkeypatch.setattr("__main__.__spec__", None)
    monkeypatch.delenv(COMMAND, raising=False)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("train.py lr=0.1", "train.py"),
        ("scripts/train.py -m --config-dir conf2 lr=0.1,0.2 seed=1", "scripts/train.py --config-dir conf2"),
        ("train.py lr=1 -cn mine --multirun --config-path=/x", "train.py -cn mine --config-path=/x"),
        ("train.py hydra.searchpath=[file:///conf] experiment=mine", "train.py hydra.searchpath=[file:///conf]"),
    ],
)
def test_the_flags_stay_and_the_overrides_go(line: str, kept: str) -> None:
    assert command_line(line.split()) == ["python", *kept.split()]


def test_a_job_in_another_process_knows_its_sweeps_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, COMMAND, "python 'my scripts/train.py' -cn mine")
    assert command_line() == ["python", "my scripts/train.py", "-cn", "mine"]


def test_an_override_is_what_was_typed_and_not_what_it_came_to() -> None:
    config = OmegaConf.create({"lr": 0.1, "task": ["lr=0.1", "optimizer.lr=${lr}"]})
    assert typed(config.task) == ["lr=0.1", "optimizer.lr=${lr}"]
