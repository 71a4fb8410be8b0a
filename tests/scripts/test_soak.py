import contextlib
import importlib
import threading
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT, run_process

pytestmark = pytest.mark.slow

FLAT = {"memory": 400 * 2**20, "files": 7, "threads": 2, "event_bytes": 0}


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "laboratory"))
    return importlib.import_module("soak")


def test_a_little_soak_is_flat(tmp_path: Path) -> None:
    ended = run_process(tmp_path, "laboratory/soak", "--runs", "2", "--steps", "40")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("flat: ")
    assert len(ended.stdout.splitlines()) == 1 + 2 + 1 + 20 + 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("what", "each"), [("memory", 2**20), ("files", 1), ("threads", 1), ("event_bytes", 2**12)])
def test_what_piles_up_is_noticed(soak: ModuleType, what: str, each: int) -> None:
    leaking = [soak.Sample(count, **{**FLAT, what: FLAT[what] + count * each}) for count in range(0, 1000, 50)]
    (line,) = soak.growth(leaking)
    assert "grew" in line


@pytest.mark.parametrize("what", ["memory", "open files", "threads", "events"])
def test_a_leak_that_was_planted_is_noticed(soak: ModuleType, tmp_path: Path, what: str) -> None:
    with contextlib.ExitStack() as held:
        kept = []

        def leak() -> None:
            if what == "memory":
                kept.append(b"x" * 2**23)
            elif what == "open files":
                held.enter_context((tmp_path / "file").open("w"))
            elif what == "threads":
                over = threading.Event()
                held.callback(over.set)
                threading.Thread(target=over.wait).start()
            else:
                with (tmp_path / "events.out.tfevents.1").open("ab") as stream:
                    stream.write(bytes(2**18))

        samples = []
        for count in range(20):
            leak()
            samples.append(soak.Sample.take(count, tmp_path))
        assert [line.split(" grew ")[0] for line in soak.growth(samples)] == [what]


def test_events_at_a_constant_rate_are_no_leak(soak: ModuleType) -> None:
    steady = [soak.Sample(count, **{**FLAT, "event_bytes": 14 * count}) for count in range(0, 10**6, 50_000)]
    assert not list(soak.growth(steady))
    (line,) = soak.growth([soak.Sample(each.count, **{**FLAT, "event_bytes": 3 * each.event_bytes}) for each in steady])
    assert line == "events grew by 42 bytes for each of 750,000, more than 30"


def test_what_a_cache_takes_at_first_is_no_leak(soak: ModuleType) -> None:
    warm = soak.Sample(50, **FLAT)
    cold = soak.Sample(0, **{**FLAT, "memory": 200 * 2**20, "files": 5, "threads": 1})
    assert not list(soak.growth([cold, warm, *[soak.Sample(count, **FLAT) for count in range(100, 1000, 50)]]))
