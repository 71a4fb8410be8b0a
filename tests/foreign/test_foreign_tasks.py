"""Tasks as other people write them, in a folder of their own, under the scripts as they are: by configuration alone."""

import csv
import functools
import importlib
import math
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from tests.conftest import Outcome, only_run, read_json, run_process

PROJECT = Path(__file__).parent
CONF = ("--config-dir", str(PROJECT / "conf"))
OF_A_LINE = re.compile(r"least.squares|linear regression|\ba line\b|closed form|R²|\br2\b|2/λ", re.IGNORECASE)
NUM_BATCHES = 6  # an epoch, of two

Run = Callable[..., Outcome]


@dataclass(frozen=True)
class Task:
    """What a run of it must say."""

    header: str
    data: str
    module: str
    logged: set[str]
    learning_rate: float
    monitor: str = "val/loss"
    mode: str = "min"
    steps: int = 2 * NUM_BATCHES
    evaluated: tuple[str, ...] = ()
    predicted: str | None = None


TASKS = {
    "cnn": Task(
        "ShapesData · ConvNet · AdamW, lr 0.02 · cpu",
        "tasks.shapes.ShapesData",
        "tasks.cnn.ConvNet",
        {"train/loss", "val/loss", "val/accuracy", "test/loss"},
        0.02,
        monitor="val/accuracy",
        mode="max",
        evaluated=("accuracy", "loss"),
        predicted="prediction",
    ),
    "mlp": Task(
        "ShapesData · Classifier · Adam, lr 0.01 · cpu",
        "tasks.shapes.ShapesData",
        "tasks.mlp.Classifier",
        {"train_loss", "train_loss_step", "train_loss_epoch", "val/loss", "val/error"},
        0.01,
        evaluated=("error", "loss"),
        predicted="label,upright,lying",
    ),
    "gan": Task(
        "ShapesData · GAN · Adam, Adam, lr 0.002 · cpu",
        "tasks.shapes.ShapesData",
        "tasks.gan.GAN",
        {"g_loss", "d_loss"},
        0.002,
        monitor="g_loss",
        steps=4 * NUM_BATCHES,
    ),
    "autoencoder": Task(
        "ShapesData · Autoencoder · SGD, lr 0.1 · cpu",
        "tasks.shapes.ShapesData",
        "tasks.autoencoder.Autoencoder",
        {"train/loss", "val/loss", "test/loss"},
        0.1,
        evaluated=("loss",),
        predicted="prediction",
    ),
    "forecast": Task(
        "ReadingsData · Forecast · SGD, lr 0.05 · cpu",
        "tasks.readings.ReadingsData",
        "tasks.forecast.Forecast",
        {"train/error", "test/error"},
        0.05,
        evaluated=("error",),
        predicted="prediction",
    ),
}
tasks = pytest.mark.parametrize("name", TASKS)
pytestmark = [  # Lightning's remarks that a part of the data, or a step, is not used
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


@pytest.fixture
def run(script: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script in an empty folder, with somebody else's configuration and modules."""
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT), prepend=":")
    return lambda name, *arguments: script(name, *(() if name == "report" else CONF), *arguments)


def count_constructions(monkeypatch: pytest.MonkeyPatch, task: Task) -> Counter[str]:
    """Counts what a run makes."""
    counts: Counter[str] = Counter()

    def watch(kind: type, name: str) -> None:
        original = getattr(kind, name)

        @functools.wraps(original)
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            counts[f"{kind.__name__}.{name}"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, counted)

    data, module = (
        getattr(importlib.import_module(full.rpartition(".")[0]), full.rpartition(".")[2])
        for full in (task.data, task.module)
    )
    for kind in (data, module, lightning.Trainer):
        watch(kind, "__init__")
    watch(module, "configure_optimizers")
    return counts


def check_nothing_is_said_of_lines(*texts: str) -> None:
    for text in texts:
        assert not OF_A_LINE.search(text.replace('"least_squares_loss": null', "")), text


def state(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def check_same(one: Any, other: Any) -> None:
    """To the bit, whatever is nested in whatever."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            check_same(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            check_same(first, second)
    else:
        assert one == other


@pytest.mark.parametrize(
    "word", ["Least squares", "linear regression", "a line's", "closed form", "R²", "val/r2", "2/λ"]
)
def test_words_of_a_line_are_found(word: str) -> None:
    with pytest.raises(AssertionError):
        check_nothing_is_said_of_lines(f"optimum  {word} 0.4")


@tasks
def test_a_task_is_trained_evaluated_and_asked_for_predictions(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    task = TASKS[name]
    counts = count_constructions(monkeypatch, task)
    ended = run("train", f"experiment={name}")
    assert ended.code == 0, ended.err
    assert set(counts.values()) == {1}, counts
    assert len(counts) == 4
    assert ended.out.splitlines()[0] == task.header
    folder = only_run(tmp_path)
    result = read_json(folder)
    assert result["status"] == "completed"
    assert result["error"] is None
    assert set(result["metrics"]) == task.logged
    assert all(math.isfinite(value) for value in result["metrics"].values())
    assert (result["monitor"], result["mode"]) == (task.monitor, task.mode)
    assert result["objective"] == result["metrics"].get(task.monitor)
    assert result["learning_rate"] == pytest.approx(task.learning_rate)
    assert result["num_optimizer_steps"] == task.steps
    assert result["verdict"]
    assert result["least_squares_loss"] is result["excess_loss"] is result["largest_stable_learning_rate"] is None
    # One line for all that has no leave to compute the loss again, and how to give it.
    off, *others = ended.err.splitlines()
    why = "there are several optimizers" if name == "gan" else r"\w+ has no method `loss\(batch\)`: add one, or give"
    assert re.match(rf"WARNING: .* is off, like everything that evaluates a step's loss again: {why}", off), ended.err
    monitor = "`monitor` names val/loss, which was never logged, so there is no objective. Logged: train/error, test"
    assert [line[: len(monitor) + 9] for line in others] == [f"WARNING: {monitor}"] * (result["objective"] is None)
    said = [ended.out, ended.err, *((folder / each).read_text() for each in ("result.json", "train.log"))]

    evaluated = run("evaluate", f"run={folder}")
    if task.evaluated:
        assert evaluated.code == 0, evaluated.err
        *metrics, of = evaluated.out.splitlines()
        assert tuple(sorted(line.split()[0] for line in metrics)) == task.evaluated
        assert of.split()[0] == "of"
    else:
        assert evaluated.code == 1
        assert re.fullmatch(
            r"error: `run` .*`validation_step`.*`test_step`.*: GAN on ShapesData do not\.\n", evaluated.err
        )
    predicted = run("predict", f"run={folder}")
    if task.predicted:
        assert predicted.code == 0, predicted.err
        header, *rows = predicted.out.splitlines()
        assert header == task.predicted
        assert len(rows) == (24 if name == "forecast" else 16)
    else:
        assert predicted.code == 1
        assert predicted.out == ""
        assert re.fullmatch(r"error: `run` .*`predict_step`.*: GAN on ShapesData do not\.\n", predicted.err)
    check_nothing_is_said_of_lines(*said, evaluated.out + evaluated.err, predicted.out + predicted.err)


@pytest.mark.slow
@tasks
def test_a_task_that_is_stopped_in_the_middle_of_an_epoch_is_resumed_to_the_bit(
    run: Run, tmp_path: Path, name: str
) -> None:
    assert run("train", f"experiment={name}", "hydra.run.dir=whole").code == 0
    stop = (f"experiment={name}", "callbacks=stopped", "callbacks.checkpoints.every_n_steps=1")
    told = run("train", *stop, "hydra.run.dir=told")
    assert told.code == 143, told.err
    (tmp_path / "stopped").unlink()
    killed = run_process(tmp_path, "train", *CONF, *stop, "callbacks.stop.name=SIGKILL", "hydra.run.dir=killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for folder in ("told", "killed"):
        before = state(tmp_path / folder)
        steps = TASKS[name].steps // (2 * NUM_BATCHES)
        assert NUM_BATCHES * steps < before["global_step"] < 2 * NUM_BATCHES * steps
        resumed = run("train", f"resume={folder}")
        assert resumed.code == 0, resumed.err
        here, there = state(tmp_path / folder), state(tmp_path / "whole")
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            check_same(here[key], there[key])
        result, expected = read_json(tmp_path / folder), read_json(tmp_path / "whole")
        assert result["metrics"] == expected["metrics"]
        assert result["status"] == "completed"
        check_nothing_is_said_of_lines(resumed.out, resumed.err, (tmp_path / folder / "train.log").read_text())


@pytest.mark.slow
@tasks
def test_a_task_is_swept_over_two_rates_and_reported(run: Run, tmp_path: Path, name: str) -> None:
    ended = run("train", "-m", f"experiment={name}", "lr=0.01,0.02", "hydra.sweep.dir=sweep")
    assert ended.code == 0, ended.err
    sweep, task = tmp_path / "sweep", TASKS[name]
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["completed"] * 2
    assert sorted(float(row["learning_rate"]) for row in rows) == (
        [0.1, 0.1] if name == "autoencoder" else [0.01, 0.02]
    )
    assert task.logged <= set(rows[0])
    assert (sweep / "learning_rate.png").is_file()
    page = (sweep / "report.html").read_text()
    if name != "forecast":
        extreme = "highest" if task.mode == "max" else "lowest"
        assert f"The {extreme} {task.monitor}, " in page
    texts = [(sweep / "sweep.csv").read_text(), re.sub(r"data:image/[^\"]*", "", page)]
    check_nothing_is_said_of_lines(ended.out, ended.err, *texts)
    report = run("report", "sweep")
    assert report.code == 0
    check_nothing_is_said_of_lines(report.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=readings", "model=cnn"], "TypeError: conv2d() received an invalid combination of arguments"),
        (["data=shapes", "model=forecast"], "TypeError: list indices must be integers or slices, not str"),
        (["data=diabetes", "model=mlp"], "RuntimeError: mat1 and mat2 shapes cannot be multiplied (64x10 and 64x16)"),
    ],
    ids=["dictionaries", "pairs", "columns"],
)
def test_data_of_one_task_and_a_model_of_another_are_named_where_the_first_step_shows_it(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    ended = run("train", *arguments)
    assert ended.code == 1
    data, model = arguments
    error = ended.err.splitlines()[-1]
    assert error.startswith(f"error: {message}")
    assert error.endswith(f" (in the first step of {model} on {data}: do they belong to the same task?)")
    assert all(line.startswith("WARNING: ") for line in ended.err.splitlines()[:-1])  # what has no leave is off
    result = read_json(only_run(tmp_path))
    assert (result["status"], result["num_optimizer_steps"]) == ("failed", 0)
    assert error == f"error: {' '.join(result['error']['message'].split())}"


def test_data_of_one_task_and_a_model_of_another_are_named_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    ended = run("train", "data=shapes", "model=digits")
    assert ended.code == 1
    assert re.fullmatch(
        r"error: `model\.num_features` must be given: .* \(got data=shapes, model=digits\)\.\n", ended.err
    )
    assert not list(tmp_path.iterdir())


def test_an_argument_that_nobody_gives_is_named_with_the_place_to_write_it(run: Run, tmp_path: Path) -> None:
    ended = run("train", "experiment=gan", "~model.latent_dim")
    assert ended.code == 1
    assert ended.err == (
        "error: `model.latent_dim` must be given: GAN needs it, and ShapesData has no attribute of that name. Write it "
        "into the file in conf/model/, or type +model.latent_dim=…; or choose `model=` and `data=` of one task (got "
        "data=shapes, model=gan).\n"
    )
    assert not list(tmp_path.iterdir())
