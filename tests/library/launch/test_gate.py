import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome, run_process

FILES = {
    "empty.csv": "",
    "header.csv": "a,y\n",
    "one_row.csv": "a,y\n1,2\n",
    "nan.csv": "a,y\n1,2\n3,nan\n",
    "inf.csv": "a,y\n1,2\ninf,4\n",
    "blank.csv": "a,y\n1,\n3,4\n",
    "text.csv": "a,y\n1,2\nred,4\n",
    "twice.csv": "a,a,y\n1,2,3\n",
}
REFUSED = [
    ("lr=-1", "`lr` must be a finite number greater than 0, got -1."),
    ("lr=0", "`lr` must be a finite number greater than 0, got 0."),
    ("lr=abc", "`lr` must be a finite number greater than 0, got 'abc'."),
    ("lr=nan", "`lr` must be a finite number greater than 0, got nan."),
    ("lr=inf", "`lr` must be a finite number greater than 0, got inf."),
    ("lr=null", "`lr` must be a finite number greater than 0, got null."),
    ("-m lr=0,01", "got 0. (in the sweep over lr=0,01) Decimals are written with a point."),
    ("-m lr=0.1,-1", "got -1. (in the sweep over lr=0.1,-1)"),
    ("-m lr=0.1,0.2 data.batch_size=4,0", "`data.batch_size` must be a whole number of at least 1, got 0."),
    ("-m model=automatic,manual optimizer=lbfgs", "Cannot train `model=manual` with `optimizer=lbfgs`."),
    ("lrr=0.1", "`lrr` is not a key. Did you mean `lr`?"),
    ("+lrr=0.1", "`lrr` is not a key. Did you mean `lr`?"),
    ("-m lrr=0.1,0.2", "`lrr` is not a key. Did you mean `lr`?"),
    ("+foo=bar", "`foo` is not a key."),
    ("optimizr=adam", "`optimizr` is not a key. Did you mean `optimizer`?"),
    ("optimizer=sdg", "Available options in 'optimizer': adam, adamw, lbfgs, momentum, sgd."),
    ("+optimizer.momentum=-1", "Invalid momentum value: -1"),
    ("trainer.max_epochs=three", "`trainer.max_epochs` must be a whole number or null, got 'three'."),
    ("trainer.max_epoch=3", "`trainer.max_epoch` is not a key. Did you mean `trainer.max_epochs`?"),
    ("seed=-1", "`seed` must be a whole number from 0 to 4294967295, got -1."),
    ("data=table", "`data.path` must be given, since it has no default: data.path=…"),
    ("data.path=missing.csv", "`data.path` must name a CSV or Parquet file, got 'missing.csv': there is no such file."),
    ("data.path=empty.csv data.target=y", "empty.csv must start with a line of column names"),
    ("data.path=header.csv data.target=y", "header.csv must hold rows below its header, got none."),
    ("data.path=one_row.csv data.target=y", "one_row must leave 2 rows to train on"),
    ("data.path=nan.csv data.target=y", "nan must leave 2 rows to train on"),
    ("data.path=inf.csv data.target=y", "inf.csv, row 2 (line 3), column 'a' must be a finite number, got 'inf'."),
    ("data.path=blank.csv data.target=a data.missing=refuse", "blank.csv, row 1 (line 2), column 'y' must be a finite"),
    (
        "data.path=text.csv data.target=y data.text=refuse",
        "text.csv, row 2 (line 3), column 'a' must be a finite number",
    ),
    ("data.path=text.csv data.target=a", "text.csv: 'a' must be a column of numbers"),
    ("data.path=text.csv data.target=y data.text=maybe", "`data.text` must be one of one_hot, refuse, got 'maybe'."),
    ("data.path=twice.csv data.target=y", "twice.csv must name each column once, got 'a' 2 times."),
    ("data.path=text.csv", "`data.target` must be a column of text.csv (a, y), got 'progression'."),
    ("data.features=[age,weight]", "`data.features` must be columns of"),
    ("data.batch_size=0", "`data.batch_size` must be a whole number of at least 1, got 0."),
    ("data=synthetic data.num_rows=2", "`data.num_rows` must be at least 3 with 1 features, got 2."),
    ("data=synthetic data.condition_number=0", "`data.condition_number` must be between 1 and 1e12, got 0."),
    ("device=gpu", "`device=gpu` must be a device that PyTorch"),
    ("device=mps", "`device=mps` must be a device that PyTorch"),
    ("device=tpu", "Available options in 'device': auto, cpu, gpu, mps."),
    ("model=manual optimizer=lbfgs", "Cannot train `model=manual` with `optimizer=lbfgs`. This is because"),
    ("model=manual +trainer.gradient_clip_val=1", "model.gradient_clip_val"),
    ("model=manual +trainer.accumulate_grad_batches=2", "`trainer.accumulate_grad_batches` with manual optim"),
    ("callbacks.gradient_monitor.every_n_steps=0", "`callbacks.gradient_monitor.every_n_steps` must be"),
    (
        "scheduler=warmup_cosine scheduler.scheduler.warmup=1",
        "`warmup` must be a share of the run between 0 and 1, got 1.",
    ),
    (
        "scheduler=cosine trainer.max_epochs=-1",
        "`scheduler.scheduler` must know where the run ends: set `trainer.max_epochs` or `trainer.max_steps`, got -1 "
        "for both.",
    ),
    (
        "scheduler=plateau +trainer.limit_val_batches=0",
        "`trainer.limit_val_batches` must be greater than 0 with this schedule, got 0. "
        "This is because it looks at `val/loss` after each validation.",
    ),
    (
        "scheduler=plateau +trainer.check_val_every_n_epoch=null +trainer.val_check_interval=5",
        "`trainer.check_val_every_n_epoch` must be a number of epochs with this schedule, got null. "
        "This is because it looks at `val/loss` after each validation.",
    ),
    ("hydra.run.dir=empty.csv/run", "`hydra.run.dir` must be a folder that can be written"),
    ("hydra.run.dir=/proc/nowhere/run", "/proc"),
    ("-m lr=0.1 hydra.sweep.dir=empty.csv/sweep", "`hydra.sweep.dir` must be a folder that can be written"),
    ("lr=[1,", "`lr` must be a finite number greater than 0, got '[1,'."),
]


@pytest.mark.parametrize(("command", "message"), REFUSED, ids=[command for command, _ in REFUSED])
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    script: Callable[..., Outcome], tmp_path: Path, command: str, message: str
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    ended = script("train", *command.split())
    assert ended.code == 1
    assert message in ended.err
    assert ended.err.startswith("error: ")
    assert len(ended.err.splitlines()) == 1
    assert ended.out == ""
    assert {file.name for file in tmp_path.iterdir()} == set(FILES)


@pytest.mark.slow
def test_the_same_holds_for_a_process_of_its_own(tmp_path: Path) -> None:
    for command, message in (
        ("device=gpu", "device=auto"),
        ("-m lr=0,01", "written with a point"),
        ("-m device=[]", "device.accelerator"),
    ):
        ended = run_process(tmp_path, "train", *command.split())
        assert ended.returncode == 1
        assert message in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
        assert ended.stdout == ""
        assert not list(tmp_path.iterdir())


def test_flags_may_stand_anywhere_and_values_hold_any_text(script: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "Größe – 数据 (1)"
    folder.mkdir()
    (folder / "a 'b'.csv").write_text("x,price [EUR]\n" + "".join(f"{row},{row * 2 % 7}\n" for row in range(40)))
    table = ("data=table", f"data.path={folder}/a 'b'.csv", "data.target=price [EUR]", "data.batch_size=8")
    ended = script("train", "lr=0.01,0.02", "-m", *table, "trainer.max_epochs=1", "hydra.sweep.dir=s")
    assert ended.code == 0, ended.out + ended.err
    with (tmp_path / "s" / "sweep.csv").open() as stream:
        assert [row["status"] for row in csv.DictReader(stream)] == ["completed", "completed"]


def test_a_number_where_text_is_wanted_is_answered_with_the_way_to_write_it(script: Callable[..., Outcome]) -> None:
    refused = script("train", "data.path=1992")
    assert refused.code == 1
    assert """To pass it as text, use both kinds of quotes: 'data.path="1992"'.""" in refused.err
