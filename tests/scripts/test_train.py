import csv
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import ROOT, Outcome, only_run, read_events, read_json, run_process, scalars

Script = Callable[..., Outcome]
FAST = ("trainer.max_epochs=3",)
EVERY_5 = ("callbacks.gradient_monitor.every_n_steps=5", "callbacks.learning_rate_effects.every_n_steps=5")


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
    return state


def test_the_default_run_leaves_what_the_readme_says(tmp_path: Path) -> None:
    ended = run_process(tmp_path, "train")
    assert ended.returncode == 0, ended.stderr
    # On a machine that takes more than ten seconds, a line now and then says how far it is.
    assert [line for line in ended.stderr.splitlines() if not line.startswith("  epoch ")] == []
    run = only_run(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[a-z2-9]{4}", run.name)
    events = [file.name for file in run.iterdir() if file.name.startswith("events.out.tfevents.")]
    assert len(events) == 1
    pictures = {f"{name}_{run.name}_lr=0.02.png" for name in ("loss_surface", "step_along_gradient")}
    others = {file.name for file in run.iterdir()} - set(events) - pictures
    assert others == {".hydra", ".lock", "checkpoints", "result.json", "train.log"}
    assert all((run / name).exists() for name in pictures)
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    lines = ended.stdout.splitlines()
    assert lines[0] == ('diabetes: 442 rows, 10 features, target "progression" · LinearRegression · SGD, lr 0.02 · cpu')
    assert f"  run       outputs/runs/{run.name}" in lines
    assert "  look      make dashboard" in lines


def test_the_trained_line_is_the_one_of_lstsq(script: Script, tmp_path: Path) -> None:
    whole_batches = ("data.batch_size=1000", "optimizer=lbfgs", "lr=1", "trainer.max_epochs=10")
    assert script("train", *whole_batches).code == 0
    run = only_run(tmp_path)
    table = np.loadtxt(ROOT / "src/template/regression/diabetes.csv", delimiter=",", skiprows=1)
    units = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["TableData"]
    features = (table[:, :-1] - units["feature_units"]["mean"].numpy()) / units["feature_units"]["scale"].numpy()
    target = (table[:, -1] - units["target_units"]["mean"].numpy()) / units["target_units"]["scale"].numpy()
    # Independent of the code under test but for which rows are for training: the split's own stream.
    rows = np.random.default_rng([1, 0]).permutation(442)[: 442 - 44 - 44]
    assert np.allclose(features[rows].mean(axis=0), 0.0, atol=1e-12)
    inputs = torch.from_numpy(np.column_stack([features[rows], np.ones(len(rows))]))
    solution = torch.linalg.lstsq(inputs, torch.from_numpy(target[rows])).solution
    trained = torch.cat([value.flatten() for value in weights(run).values()]).double()
    torch.testing.assert_close(trained, solution, atol=1e-3, rtol=0)  # float32's gradient over λ's least
    result = read_json(run)
    loss = float((inputs @ solution - torch.from_numpy(target[rows])).square().mean())
    assert result["least_squares_loss"] == pytest.approx(loss, rel=1e-5)  # the rows as float32
    assert 0 <= result["excess_loss"] < 1e-5


def test_the_result_says_what_happened(script: Script, tmp_path: Path) -> None:
    assert script("train", "lr=0.01", "seed=3", *FAST).code == 0
    result = read_json(only_run(tmp_path))
    assert result["status"] == "completed"
    assert result["error"] is None
    assert result["learning_rate"] == 0.01
    assert result["largest_stable_learning_rate"] == pytest.approx(2 / result["sharpness"])
    assert result["objective"] == result["metrics"]["val/loss"]
    assert result["num_optimizer_steps"] == 18  # 354 rows in batches of 64, three times
    assert result["overrides"] == ["lr=0.01", "seed=3", *FAST]
    assert result["seed"] == 3
    assert result["device"] == "cpu"
    # The index's build for CUDA calls itself 2.14.1+cu130, and its distribution 2.14.1.
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(result["metrics"]) == {
        "train/loss",
        *(f"{part}/{name}" for part in ("val", "test") for name in ("loss", "mae", "r2")),
    }


@pytest.mark.parametrize("model", ["automatic", "manual"])
def test_tensorboard_finds_the_tags(script: Script, tmp_path: Path, model: str) -> None:
    assert script("train", f"model={model}", *EVERY_5, *FAST).code == 0
    run = only_run(tmp_path)
    tags = read_events(run).Tags()
    elements = [f"linear.weight[0,{index}]" for index in range(10)] + ["linear.bias[0]"]
    assert set(tags["scalars"]) == {
        *("train/loss", "val/loss", "val/mae", "val/r2", "test/loss", "test/mae", "test/r2", "train/excess_loss"),
        *("Loss/log10_train", "Loss/log10_val"),
        *("gradient_norm/total", "gradient_norm/linear.weight", "gradient_norm/linear.bias"),
        "gradient_norm/applied",
        *("learning_rate_effect/critical", "learning_rate_effect/critical_ratio"),
        "learning_rate/SGD",
        *(
            "learning_rate_effect/effective",
            "learning_rate_effect/gradient_cosine",
            "learning_rate_effect/descent_ratio",
        ),
        *("update_ratio/total", "update_ratio/linear.weight", "update_ratio/linear.bias"),
        *(f"gradient_value/{element}" for element in elements),
        *(f"parameter_value/{element}" for element in elements),
    }
    assert tags["histograms"] == ["gradient/linear.weight", "gradient/linear.bias"]
    assert [step for step, _ in scalars(run, "gradient_norm/total")] == [*range(18)]  # the first hundred
    assert [step for step, _ in scalars(run, "learning_rate_effect/descent_ratio")] == [0]
    assert [step for step, _ in scalars(run, "val/loss")] == [6, 12, 18]
    assert [step for step, _ in scalars(run, "train/loss")] == [6, 12, 18]
    assert scalars(run, "val/loss")[-1][1] == pytest.approx(read_json(run)["metrics"]["val/loss"], rel=1e-6)


def test_same_seed_same_bits_and_both_modes_agree(script: Script, tmp_path: Path) -> None:
    for name, overrides in {"a": [], "b": [], "manual": ["model=manual"], "other": ["seed=1"]}.items():
        assert script("train", f"hydra.run.dir={name}", *overrides, *FAST).code == 0
    first, second, manual, other = (weights(tmp_path / name) for name in ("a", "b", "manual", "other"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], manual[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_observers_and_loggers_change_no_bit(script: Script, tmp_path: Path) -> None:
    for name, overrides in {"all": ["callbacks.gradient_monitor.every_n_steps=1"], "none": ["logger=none"]}.items():
        assert script("train", f"hydra.run.dir={name}", *overrides, *FAST).code == 0
    every, none = (weights(tmp_path / name) for name in ("all", "none"))
    assert all(torch.equal(every[name], none[name]) for name in every)


def test_the_users_own_file(script: Script, tmp_path: Path) -> None:
    (tmp_path / "houses.csv").write_text(
        "size;straße;price\n" + "".join(f"{i};{i % 7};{2 * i + 1}\n" for i in range(60))
    )
    ended = script("train", "data.path=houses.csv", "data.target=price", *FAST)
    assert ended.code == 0, ended.err
    assert ended.out.startswith('houses: 60 rows, 2 features, target "price"')


def test_synthetic_data_and_a_picture_book_line(script: Script, tmp_path: Path) -> None:
    ended = script("train", "data=synthetic", "lr=0.3", "trainer.max_epochs=20")
    assert ended.code == 0
    result = read_json(only_run(tmp_path))
    assert result["sharpness"] == pytest.approx(2.0, rel=0.1)  # exactly 2 over all rows, of which these are 8 in 10
    assert result["excess_loss"] < 1e-3


def test_a_constant_column_is_warned_of(script: Script, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,y\n" + "".join(f"{i},1,{i * i}\n" for i in range(20)))
    ended = script("train", "data.path=t.csv", "data.target=y", "data.batch_size=100", *FAST)
    assert ended.code == 0
    assert ended.err.splitlines() == [
        "WARNING: t: constant in the training rows, so without use: b.",
    ]


def test_an_overfitted_batch_is_the_same_batch_each_time(script: Script, tmp_path: Path) -> None:
    table = ("data=synthetic", "data.num_features=3", "data.noise=1", "lr=0.1", "data.batch_size=8", "logger=csv")
    assert script("train", "trainer=overfit", *table, "trainer.max_epochs=150", "hydra.run.dir=run").code == 0
    with (tmp_path / "run/csv/version_0/metrics.csv").open() as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]
    assert len(losses) == 150
    assert all(
        later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses)
    )  # full batches of these eight rows


def test_a_line_through_as_many_features_as_rows_is_called_over_fitted(script: Script, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table = np.round(random.normal(size=(50, 31)), 3)  # 40 rows to train on, whose target is nothing but noise
    text = "\n".join(
        [",".join([*(f"x{index}" for index in range(30)), "y"]), *(",".join(map(str, row)) for row in table)]
    )
    (tmp_path / "t.csv").write_text(text)
    ended = script("train", "data=table", "data.path=t.csv", "data.target=y", "lr=0.1", "trainer.max_epochs=100")
    assert re.search(r"^  overfit   val/loss is 4.7 × train/loss: more rows, ", ended.out, re.MULTILINE)
    assert "  r2        val -" in ended.out


def test_one_batch_has_no_verdict(script: Script, tmp_path: Path) -> None:
    ended = script("train", "trainer=debug")
    assert ended.code == 0
    assert "verdict" not in ended.out
    assert read_json(only_run(tmp_path))["verdict"] is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=momentum", "lr=0.01"],
        ["optimizer=adam"],
        ["optimizer=adamw"],
        ["optimizer=lbfgs", "lr=1", "data.batch_size=1000"],
        ["scheduler=cosine"],
        ["scheduler=step"],
        ["scheduler=warmup_cosine", "scheduler.scheduler.warmup=0.3"],
        ["scheduler=plateau"],
        ["scheduler=plateau", "model=manual"],
        ["trainer=debug"],
        ["trainer=fast"],
        ["trainer=limit"],
        ["trainer=overfit"],
        ["trainer=profiler"],
        ["callbacks=early_stopping"],
        ["logger=many"],
        ["callbacks=none"],
        ["callbacks=gradient_monitor"],
        ["callbacks=checkpoints"],
        ["callbacks=flight_recorder"],
        ["callbacks=progress"],
        ["logger=csv"],
        ["logger=none"],
        ["device=cpu"],
        ["experiment=too_slow"],
        ["+trainer.gradient_clip_val=0.1"],
        ["+trainer.accumulate_grad_batches=2"],
        ["+trainer.precision=bf16-mixed"],
        ["model=manual", "model.gradient_clip_val=0.1"],
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_every_option_trains(script: Script, tmp_path: Path, overrides: list[str]) -> None:
    ended = script("train", *overrides, *FAST)
    assert ended.code == 0, ended.err
    assert read_json(only_run(tmp_path))["status"] == "completed"
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    chosen = only_run(tmp_path).name.split("_", 3)[3]  # after date, time and four characters: to tell runs apart by
    assert all(override.removeprefix("experiment=").split("=")[0] in chosen for override in overrides)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["+trainer.accumulate_grad_batches=2"], ["model=manual"]], ids=str)
def test_two_processes_are_one_on_the_joined_batch(script: Script, tmp_path: Path, overrides: list[str]) -> None:
    given = ["device=cpu", *overrides, *EVERY_5, *FAST]
    ended = run_process(tmp_path, "train", "trainer=ddp", "data.batch_size=32", "hydra.run.dir=two", *given)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("diabetes: 442 rows") == 1
    two, one = tmp_path / "two", tmp_path / "one"
    assert len(list(two.glob("events.out.tfevents.*"))) == 1
    assert read_json(two)["status"] == "completed"
    assert script("train", "data.batch_size=64", "hydra.run.dir=one", *given).code == 0
    # Each process knows the loss of its own share alone.
    needs_the_loss = {f"learning_rate_effect/{name}" for name in ("descent_ratio", "critical", "critical_ratio")}
    tags = set(read_events(one).Tags()["scalars"]) - needs_the_loss
    assert set(read_events(two).Tags()["scalars"]) == tags
    for tag in tags:
        alone, together = scalars(one, tag), scalars(two, tag)
        assert [step for step, _ in together] == [step for step, _ in alone]
        # Another order of sums; an element or a cosine near 0 has no digits of its own.
        assert [value for _, value in together] == pytest.approx([value for _, value in alone], rel=1e-4, abs=1e-5), tag


@pytest.mark.parametrize("model", ["automatic", "manual"])
def test_a_divergence_is_told_by_the_exit_code_and_recorded(tmp_path: Path, model: str) -> None:
    ended = run_process(tmp_path, "train", "lr=5", "data.batch_size=1000", f"model={model}", "+trainer.min_epochs=50")
    assert ended.returncode == 3
    assert re.search(r"  diverged  the loss grew to .* at step 3 \(epoch 3, batch 0\): try a smaller lr", ended.stdout)
    assert "flight_record.json" in ended.stdout
    assert "Diverged" not in ended.stderr  # once is enough
    run = only_run(tmp_path)
    result, record = read_json(run), json.loads((run / "flight_record.json").read_text())
    assert result["status"] == "diverged"
    assert result["num_optimizer_steps"] == record["step"] == len(record["steps"]) == 3
    # Of the weights before the step, on the same rows: what the recorder saw in float32, evaluated in float64.
    assert result["metrics"]["train/loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert result["metrics"]["train/loss"] > 1e6 * record["first_loss"]
    assert all(torch.isfinite(value).all() for name in ("last", "best") for value in weights(run, name).values())
    norms = [value.norm().item() for value in weights(run).values()]
    assert list(record["steps"][-1]["parameter_norms"].values()) == pytest.approx(norms, rel=1e-6)


def test_a_divergence_is_told_without_a_recorder(tmp_path: Path) -> None:
    ended = run_process(tmp_path, "train", "lr=5", "data.batch_size=1000", "~callbacks.flight_recorder")
    assert ended.returncode == 3
    assert "diverged" in ended.stdout
    run = only_run(tmp_path)
    assert read_json(run)["metrics"]["train/loss"] is None
    assert not (run / "flight_record.json").exists()
    assert not (run / "checkpoints" / "last.ckpt").exists()


def test_last_is_the_newest_and_best_has_the_least_validation_loss(script: Script, tmp_path: Path) -> None:
    assert script("train", "trainer.max_epochs=40").code == 0
    run = only_run(tmp_path)
    losses = dict(scalars(run, "val/loss"))
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == max(losses) == 240
    assert best["global_step"] == min(losses, key=losses.__getitem__) < 240


def test_the_configuration_is_kept_as_composed(script: Script, tmp_path: Path) -> None:
    assert script("train", "lr=0.02", *FAST).code == 0
    config = OmegaConf.load(only_run(tmp_path) / ".hydra" / "config.yaml")
    assert config.lr == 0.02
    assert config.trainer.max_epochs == 3


def test_a_sweep_trains_each_rate_in_its_own_folder(tmp_path: Path) -> None:
    ended = run_process(tmp_path, "train", "-m", "lr=0.001,0.01,0.1", *FAST)
    assert ended.returncode == 0, ended.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert sweep.name.split("_", 3)[3] == "lr"
    jobs = {folder.name: read_json(folder) for folder in sweep.iterdir() if folder.is_dir()}
    assert set(jobs) == {f"lr={rate},trainer.max_epochs=3" for rate in ("0.001", "0.01", "0.1")}
    assert [job["learning_rate"] for _, job in sorted(jobs.items())] == [0.001, 0.01, 0.1]
    assert not (tmp_path / "outputs" / "runs").exists()


def test_a_job_that_cannot_run_does_not_stop_the_others(tmp_path: Path) -> None:
    ended = run_process(tmp_path, "train", "-m", "device=gpu,cpu", *FAST)
    assert ended.returncode == 1
    assert "failed    `device=gpu` must be a device that PyTorch" in ended.stdout
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    status = {folder.name.split(",")[0]: read_json(folder)["status"] for folder in sweep.iterdir() if folder.is_dir()}
    assert status == {"device=gpu": "failed", "device=cpu": "completed"}


def test_help_and_configuration_need_no_torch(tmp_path: Path) -> None:
    for flags in (["--help"], ["--cfg", "job"]):
        ended = run_process(tmp_path, "train", *flags, PYTHONPROFILEIMPORTTIME="1")
        assert ended.returncode == 0
        assert "downslope" in ended.stderr
        assert not re.search(r"\| +(torch|lightning)$", ended.stderr, flags=re.MULTILINE)
    assert "data: diabetes, digits, synthetic, table" in run_process(tmp_path, "train", "--help").stdout


def test_a_traceback_is_shown_on_request(tmp_path: Path) -> None:
    ended = run_process(tmp_path, "train", "lr=-1", HYDRA_FULL_ERROR="1")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_verbose_shows_what_the_libraries_say(tmp_path: Path) -> None:
    ended = run_process(tmp_path, "train", "hydra.verbose=true", *FAST)
    assert "GPU available" in ended.stderr
