import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, Outcome, only_run, run_process

Script = Callable[..., Outcome]
DIABETES = ROOT / "src/template/regression/diabetes.csv"


@pytest.fixture
def run(script: Script, tmp_path: Path) -> Path:
    """A short run on the diabetes table."""
    assert script("train", "trainer.max_epochs=3").code == 0
    return only_run(tmp_path)


def by_hand(run: Path, table: np.ndarray) -> np.ndarray:
    """Predictions of the best checkpoint in the target's unit, in float64."""
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    units = checkpoint["TableData"]
    weight, bias = (value.double().numpy() for value in checkpoint["state_dict"].values())
    features = (table[:, :10] - units["feature_units"]["mean"].numpy()) / units["feature_units"]["scale"].numpy()
    standardized = features @ weight[0] + bias[0]
    predictions: np.ndarray = (
        standardized * units["target_units"]["scale"].numpy() + units["target_units"]["mean"].numpy()
    )
    return predictions


def test_predictions_are_in_the_targets_unit(script: Script, run: Path) -> None:
    ended = script("predict", f"run={run}", f"data.path={DIABETES}")
    assert ended.code == 0, ended.err
    header, *lines = ended.out.splitlines()
    assert header == "progression"
    table = np.loadtxt(DIABETES, delimiter=",", skiprows=1)
    np.testing.assert_allclose([float(line) for line in lines], by_hand(run, table), rtol=1e-5)  # float32


def test_columns_are_found_by_name_and_the_target_may_be_missing(script: Script, run: Path, tmp_path: Path) -> None:
    with DIABETES.open() as file:
        rows = list(csv.DictReader(file))[:5]
    names = ["note", "s6", "s5", "s4", "s3", "s2", "s1", "bp", "bmi", "sex", "age"]
    with (tmp_path / "new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({name: row.get(name, "none") for name in names} for row in rows)
    ended = script("predict", f"run={run}", "data.path=new.csv", "output=predictions.csv")
    assert ended.code == 0, ended.err
    assert ended.out == ""
    _, *lines = (tmp_path / "predictions.csv").read_text().splitlines()
    table = np.loadtxt(DIABETES, delimiter=",", skiprows=1)[:5]
    np.testing.assert_allclose([float(line) for line in lines], by_hand(run, table), rtol=1e-5)


def test_text_dates_and_missing_cells_of_a_new_file_are_read_as_in_training(script: Script, tmp_path: Path) -> None:
    lines = [f"{i},{'Ulm' if i % 3 else 'Bonn'},2026-01-{i % 28 + 1:02d},{i * 0.5}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["size,city,sold,price", *lines]))
    settings = ("data=table", "data.path=t.csv", "data.target=price", "hydra.run.dir=run")
    assert script("train", *settings, "trainer.max_epochs=1").code == 0
    (tmp_path / "new.csv").write_text("city;sold;size\nUlm;2026-02-01;3,5\nRome;2026-02-01;3,5\nUlm;;3,5\n")
    ended = script("predict", "run=run", "data.path=new.csv")
    assert ended.code == 0, ended.err
    name, known, unknown, missing = ended.out.splitlines()
    assert (name, missing) == ("price", "nan")
    (checkpoint,) = (tmp_path / "run").rglob("last.ckpt")
    state = torch.load(checkpoint, weights_only=True)["TableData"]
    assert [column["kind"] for column in state["columns"]] == ["number", "text", "date"]
    assert state["columns"][1]["values"] == ["Bonn", "Ulm"]
    assert float(known) != float(unknown)
    assert "1 text that the run does not know" in ended.err
    assert "1 row with missing cells: predicted as nan" in ended.err


def test_evaluate_prints_the_metrics_of_the_best_checkpoint(script: Script, run: Path) -> None:
    ended = script("evaluate", f"run={run}")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    loss, mae, r2, of = ended.out.splitlines()
    assert of == f"  of        {run}/checkpoints/best.ckpt"
    table = np.loadtxt(DIABETES, delimiter=",", skiprows=1)
    order = np.random.default_rng([1, 0]).permutation(442)
    training, validation, test = order[:354], order[354:398], order[398:]
    error = (by_hand(run, table) - table[:, -1]) / table[training, -1].std()
    assert f"test {(error[test] ** 2).mean():.4f}" in loss
    assert f"val {np.abs(error[validation]).mean():.4f}" in mae
    share = (error[test] ** 2).sum() / ((table[test, -1] / table[training, -1].std()).var() * len(test))
    assert f"test {1 - share:.4g}" in r2  # four digits that count


def test_a_sweeps_job_is_named_by_its_folder(script: Script, tmp_path: Path) -> None:
    assert script("train", "-m", "lr=0.1,0.01", "trainer.max_epochs=1", "hydra.sweep.dir=rates").code == 0
    ended = script("evaluate", "run=rates/lr=0.1,trainer.max_epochs=1")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("  loss      val ")


def test_nothing_is_written_by_either(script: Script, run: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    script("evaluate", f"run={run}")
    script("predict", f"run={run}", f"data.path={DIABETES}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", [], "`run` must be given, since it has no default: run=…"),
        ("evaluate", ["run=nowhere"], "`run` must be the folder of a run, outputs/runs/…, got 'nowhere'"),
        ("evaluate", ["rum=x"], "`rum` is not a key. Did you mean `run`?"),
        ("predict", ["run={run}", "data.path=none.csv"], "`data.path` must name a CSV or Parquet file, got 'none.csv'"),
        (
            "predict",
            ["run={run}", "data.path=few.csv"],
            "must have the columns that the run was trained on, got no age",
        ),
        ("predict", ["run={run}", "data.path=inf.csv"], "row 1 (line 2), column 'bmi' must be a finite number"),
        ("predict", ["run={run}", f"data.path={DIABETES}", "output=no/such/folder.csv"], "no/such/folder.csv"),
    ],
)
def test_refusals_are_one_line(
    script: Script, run: Path, tmp_path: Path, name: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "few.csv").write_text("bmi,sex\n1,2\n")
    (tmp_path / "inf.csv").write_text("age,sex,bmi,bp,s1,s2,s3,s4,s5,s6\n1,2,inf,4,5,6,7,8,9,10\n")
    ended = script(name, *(argument.format(run=run) for argument in arguments))
    assert ended.code == 1
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_checkpoint_that_is_none_is_refused(script: Script, run: Path) -> None:
    checkpoint = run / "checkpoints" / "best.ckpt"
    for content in (b"", b"nonsense", checkpoint.read_bytes()[:500]):
        checkpoint.write_bytes(content)
        ended = script("evaluate", f"run={run}")
        assert ended.code == 1
        assert "best.ckpt cannot be read as a checkpoint" in ended.err
        assert len(ended.err.splitlines()) == 1
    checkpoint.unlink()
    assert "has no best checkpoint" in script("evaluate", f"run={run}").err  # the last one serves
    (run / "checkpoints" / "last.ckpt").unlink()
    assert "it has no checkpoints/best.ckpt" in script("evaluate", f"run={run}").err


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    assert run_process(tmp_path, "train", "trainer.max_epochs=1").returncode == 0
    command = f"{sys.executable} {ROOT}/scripts/predict.py run={only_run(tmp_path)} data.path={DIABETES} | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.stdout == "progression\n"
    assert ended.stderr == ""


def test_help_says_how(tmp_path: Path) -> None:
    for name in ("evaluate", "predict"):
        assert f"python scripts/{name}.py run=outputs/runs/" in run_process(tmp_path, name, "--help").stdout
