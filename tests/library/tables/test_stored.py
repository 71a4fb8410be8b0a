"""A table in a file: the same rows, once an epoch, in an order of (seed, epoch), and from any batch on."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import Tensor

from downslope.tables import stored
from downslope.tables.stored import StoredTable
from downslope.tables.table import read_table
from template.regression.data import TableData
from template.regression.model import LinearRegression
from tests.conftest import ROOT
from tests.table_data import rows_of

NUM_ROWS = 1000
CHUNK = 50 * 4 * 8  # 50 rows of two features, target and weight


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(stored, "CHUNK", CHUNK)
    monkeypatch.setattr(stored, "WINDOW", 3)
    random = np.random.default_rng(0)
    rows = np.column_stack([np.arange(NUM_ROWS), random.normal(size=(NUM_ROWS, 2)), random.uniform(1, 2, NUM_ROWS)])
    np.savetxt(tmp_path / "t.csv", rows, delimiter=",", header="row,b,y,w", comments="")
    return str(tmp_path / "t.csv")


def data(path: str, in_memory: bool, batch_size: int = 32, seed: int = 0, standardize: bool = False) -> TableData:
    settings = {"weight": "w", "seed": seed, "in_memory": in_memory, "standardize": standardize}
    made = TableData(path, "y", batch_size=batch_size, **settings)  # type: ignore[arg-type]
    made.setup("fit")
    return made


def served(loader: object, epoch: int = 0, start: int = 0) -> list[Tensor]:
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    loader.start = start  # type: ignore[attr-defined]
    return [features[:, 0] for features, _, _ in loader]  # type: ignore[attr-defined]


def test_every_row_is_in_one_part_and_served_once_an_epoch(path: str) -> None:
    module = data(path, in_memory=False)
    assert isinstance(module.table, StoredTable)
    parts = {
        part: torch.cat([batch[0][:, 0] for batch in module.parts[part].batches(32, None, 0, 1)])
        for part in rows_of(module)
    }
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 800, "val": 100, "test": 100}
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(1000.0))
    batches = served(module.train_dataloader())
    assert [len(batch) for batch in batches] == [32] * 25 == [32] * len(module.train_dataloader())
    assert torch.equal(torch.cat(batches).sort().values, parts["train"].sort().values)


def test_the_order_is_a_function_of_seed_and_epoch_and_goes_on_from_any_batch(path: str) -> None:
    module = data(path, in_memory=False, batch_size=7)
    first = served(module.train_dataloader(), epoch=1)
    assert all(map(torch.equal, first, served(data(path, False, 7).train_dataloader(), epoch=1)))
    for start in (1, 17, 60, len(first) - 1):
        rest = served(module.train_dataloader(), epoch=1, start=start)
        assert len(rest) == len(first) - start
        assert all(map(torch.equal, rest, first[start:]))
    assert not torch.equal(torch.cat(first), torch.cat(served(module.train_dataloader(), epoch=2)))
    assert not torch.equal(
        torch.cat(first), torch.cat(served(data(path, False, 7, seed=1).train_dataloader(), epoch=1))
    )
    steps = torch.cat(first).diff()
    assert (steps > 0).float().mean() < 0.6  # rows of different chunks, in no order


def test_a_person_s_folder_and_a_pattern_are_found(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(path).parent))
    assert read_table("~/t.csv", "y").name == "t"
    assert read_table("~/*.csv", "y").name == "~/*.csv"
    assert len(read_table("~/*.csv", "y")) == NUM_ROWS


def test_processes_share_the_rows(path: str) -> None:
    part = data(path, in_memory=False).parts["train"]
    shares = [torch.cat(served(part.batches(32, 0, rank, 3))) for rank in range(3)]
    assert [len(share) for share in shares] == [266] * 3
    assert len(torch.cat(shares).unique()) == 3 * 266


def test_units_and_closed_form_are_those_of_the_same_rows_in_memory(path: str) -> None:
    module = data(path, in_memory=False, standardize=True)
    features, target, weight = (
        torch.cat(each).double().numpy() for each in zip(*module.parts["train"].batches(32, None, 0, 1), strict=True)
    )
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(features.std(axis=0), 1, atol=1e-6)
    root = np.sqrt(weight)
    system = root[:, None] * np.column_stack([features, np.ones(len(features))])
    solution, (loss,), *_ = np.linalg.lstsq(system, root * target, rcond=None)
    line = module.least_squares
    assert line is not None
    assert line.loss == pytest.approx(loss / len(target), rel=1e-9)
    np.testing.assert_allclose(line.parameters, solution, atol=1e-9)
    assert weight.mean() == pytest.approx(1, abs=1e-6)


def test_what_does_not_fit_into_memory_goes_into_a_file_by_itself(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(TableData(path, "y", batch_size=8, seed=0).table, StoredTable)
    monkeypatch.setattr("downslope.tables.table.free_memory", lambda: 50_000.0)
    module = TableData(path, "y", batch_size=8, seed=1)
    module.setup("fit")
    assert isinstance(module.table, StoredTable)
    assert "GB in a temporary file, shuffled in windows of" in module.description()
    assert module.fingerprint().endswith(" in a file")


def test_a_limit_of_the_process_counts_as_memory_and_the_file_is_closed_with_its_table(path: str) -> None:
    code = (
        "import gc, resource, sys; from template.regression.data import TableData;"
        "from downslope.tables.stored import free_memory; before = free_memory();"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31)); assert free_memory() < min(before, 2**31);"
        f"data = TableData({path!r}, 'y', in_memory=False, batch_size=8, seed=0); file = data.table.store.file;"
        "from downslope.tables import table; table._read_table.cache_clear(); del data; gc.collect();"
        "print(file.closed)"
    )
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_the_closed_form_of_many_chunks_takes_the_memory_of_a_few() -> None:
    code = (
        "import resource, torch; from downslope.gradients.least_squares import least_squares_of;"
        "chunks = lambda num: lambda: ((torch.randn(20_000, 20), torch.randn(20_000)) for _ in range(num));"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024;"
        "least_squares_of(chunks(5)); before = peak(); least_squares_of(chunks(100)); print(peak() - before)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(ended.stdout) < 60  # MB, of 330 that the chunks take in float64


def test_what_makes_a_task_too_easy_is_warned_of_by_name(path: str, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"{i % 7},{i % 7},{i % 7 if i < 900 else 0},{i / 7},{i / 7},3" for i in range(NUM_ROWS)]
    Path(path).write_text("\n".join(["a,b,c,d,y,k", *lines]))
    for target in ("y", "k"):
        assert isinstance(read_table(path, target, exclude=["k", "y"], in_memory=False), StoredTable)
    assert caplog.messages == [
        "t: d is a copy of the target y. To leave it out: data.exclude=[d].",
        "t: the columns a and b are identical.",  # and not c, which is so in the first chunks alone
        "t: the target k is 3 in every row: there is nothing to learn.",
        "t: the columns a and b are identical.",
    ]


def test_a_full_disk_is_said(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(stored.tempfile, "TemporaryFile", lambda **_: full)
    with pytest.raises(OSError, match=r"do not fit into .*: No space left on device\. TMPDIR=… names another folder"):
        data(path, in_memory=False, seed=3)


class Seen(LinearRegression):
    """Writes down which rows each process trained on, epoch by epoch."""

    def on_fit_start(self) -> None:
        self.rows: list[list[float]] = []

    def on_train_epoch_start(self) -> None:
        self.rows.append([])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rows[-1] += batch[0][:, 0].tolist()

    def on_train_end(self) -> None:
        torch.save(self.rows, Path(self.trainer.default_root_dir, f"{self.global_rank}.pt"))


def of_two_processes(path: str, folder: str, in_memory: bool) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings: dict[str, Any] = {**quiet, "enable_model_summary": False, "default_root_dir": folder, "max_epochs": 2}
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", **settings)
    model = Seen(2, partial(torch.optim.SGD, lr=1e-9), {"scheduler": None, "interval": "", "monitor": ""})
    trainer.fit(model, datamodule=data(path, in_memory, batch_size=8))


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [True, False])
def test_two_processes_train_on_each_row_once_an_epoch(path: str, tmp_path: Path, in_memory: bool) -> None:
    command = [sys.executable, "-W", "ignore", "-m", __name__, path, str(tmp_path), str(in_memory)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    rows = rows_of(data(path, in_memory))["train"]
    expected = rows if in_memory else [row for each in rows.chunks() for row in each[0][:, 0]]
    for one, other in zip(first, second, strict=True):
        assert len(one) == len(other) == 400
        assert sorted(one + other) == sorted(expected)
    assert first[0] != first[1]


if __name__ == "__main__":
    stored.CHUNK, stored.WINDOW = CHUNK, 3
    of_two_processes(sys.argv[1], sys.argv[2], sys.argv[3] == "True")
