"""What newcomers reported, run as they ran it: what each expected is what is asserted.

Others of their cases stand beside what they are about: an interpolation in a sweep, a relative path with `chdir`
(`sweeps/test_job.py`), a schedule that ends with the run, a new one on a resume, a plateau (`runs/test_resuming.py`),
batches that are overfitted (`test_train.py`), accumulation beyond an epoch (`callbacks/test_verdict_monitor.py`), any
table (`tables/`), quoting and flags (`launch/test_gate.py`), the command that is printed (`runs/test_command_line.py`).
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Outcome, read_json

Script = Callable[..., Outcome]
CASES = Path(__file__).parent / "cases"


def trained(
    script: Script, name: str, *overrides: str, target: str = "y", codes: tuple[int, ...] = (0,)
) -> tuple[Outcome, dict[str, object]]:
    folder = f"run{len(list(Path().glob('run*')))}"
    table = ("data=table", f"data.path={CASES / name}", f"data.target={target}")
    ended = script("train", *table, *overrides, f"hydra.run.dir={folder}")
    assert ended.code in codes, ended.err
    return ended, read_json(Path(folder))


def test_the_advice_of_a_run_ends_no_higher_is_not_complained_of_and_not_repeated(script: Script) -> None:
    ended, before = trained(script, "longley.csv")
    assert "the last weights have 3.39 times that" in ended.out  # not 238.61% above
    advice = re.search(r"Try (lr=\S+)\.$", ended.out, re.MULTILINE)
    assert advice
    followed, after = trained(script, "longley.csv", advice[1])
    assert float(str(after["excess_loss"])) < float(str(before["excess_loss"]))
    assert after["verdict"] in ("converging", "converged")
    assert "Try" not in followed.out
    assert after["suggested_learning_rate"] != after["learning_rate"]


@pytest.mark.parametrize("rate", ["lr=0.0002", "lr=0.02", "lr=1"])
@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param("ccard.csv", "OWNRENT", marks=pytest.mark.slow),
        pytest.param("china_smoking.csv", "smoking_no_cancer_no", marks=pytest.mark.slow),
        ("stackloss.csv", "ACIDCONC"),
    ],
)
@pytest.mark.filterwarnings("ignore:Diverged")
def test_the_printed_command_of_a_public_table_leads_to_where_next_to_nothing_is_left(
    script: Script, name: str, target: str, rate: str
) -> None:
    """Tables of statsmodels, in the public domain; at 0.0002 far too slow, at 1 beyond the limit."""
    words, override = [], rate
    while override:
        _, result = trained(script, name, override, "~callbacks.pictures", target=target, codes=(0, 3))
        evidence = result["evidence"]
        assert isinstance(evidence, dict)
        words.append(result["verdict"])
        override = evidence["try"]
        assert len(words) <= 4
    assert words[0] in {"lr=0.0002": ["too_slow"], "lr=1": ["too_large"]}.get(rate, ["converging", "converged"])
    assert words[-1] in ("converging", "converged")
    assert evidence["hints"] == []
    assert float(str(result["excess_loss"])) < 0.01 * evidence["first_excess"]


def test_slow_directions_are_not_taken_for_the_noise_of_the_batches(script: Script) -> None:
    _, short = trained(script, "correlated.csv.gz")
    assert short["verdict"] in ("converging", "too_slow")


def test_weights_at_rest_under_decay_are_converged(script: Script) -> None:
    settings = ("lr=0.05", "+optimizer.weight_decay=0.5", "data.batch_size=1000", "trainer.max_epochs=200")
    ended, result = trained(script, "longley.csv", *settings)
    assert result["verdict"] == "converged"
    assert "more steps" not in ended.out


def test_of_a_loss_that_is_zero_to_rounding_there_is_no_percentage(script: Script) -> None:
    ended, _ = trained(script, "exact.csv", target="price")
    assert "%" not in "".join(line for line in ended.out.splitlines() if line.startswith("  optimum"))
    assert not re.search(r"loss .* 0\.0000", ended.out)


def test_seconds_since_1970_have_no_false_optimum_and_what_float32_merges_is_said(
    script: Script, tmp_path: Path
) -> None:
    lines = [f"{1_700_000_000 + row},{row / 300 + row * 7 % 5 / 100}" for row in range(300)]
    (tmp_path / "seconds.csv").write_text("\n".join(["when,price", *lines]))
    table = ("data=table", "data.path=seconds.csv", "data.target=price")
    raw = script("train", *table, "data.standardize=false", "lr=1e-20", "trainer.max_epochs=1")
    assert "float32 keeps only" in raw.err
    assert "converged" not in raw.out
    assert "optimum" not in raw.out


def test_the_printed_command_runs_the_same_configuration_from_where_the_user_stands(
    script: Script, tmp_path: Path
) -> None:
    experiments = tmp_path / "my conf" / "experiment"
    experiments.mkdir(parents=True)
    (experiments / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    (tmp_path / "my conf" / "mytrain.yaml").write_text("defaults: [train, _self_]\nlr: 0.001\n")
    (tmp_path / "houses.csv").write_text("x,y\n" + "".join(f"{row},{row * 2 % 7}\n" for row in range(40)))
    table = ("data=table", "data.path=houses.csv", "data.target=y", "trainer.max_epochs=2")
    first = script("train", "--config-dir", "my conf", "-cn", "mytrain", "experiment=mine", *table)
    _, _, command = first.out.partition("again   ")
    python, train, *arguments = shlex.split(command)
    assert (python, Path(train).name) == ("python", "train.py")
    again = script("train", *arguments)
    assert again.code == 0, again.err
    runs = [*(tmp_path / "outputs" / "runs").iterdir()]
    runs.sort(key=lambda run: (run / "result.json").stat().st_mtime_ns)  # their names have whole seconds
    assert [read_json(run)["seed"] for run in runs] == [3, 3]
    assert read_json(runs[0])["learning_rate"] == 0.001
    assert read_json(runs[1])["learning_rate"] != 0.001


@pytest.mark.parametrize("name", [pytest.param("glob(*)", marks=pytest.mark.slow), "glob(c*)"])
def test_a_glob_is_every_option_of_a_group(script: Script, tmp_path: Path, name: str) -> None:
    quick = ("trainer.max_epochs=1", "callbacks=none", "logger=none", "hydra.sweep.dir=s")
    assert script("train", "-m", f"scheduler={name}", *quick).code == 0
    options = {file.stem for file in (ROOT / "conf" / "scheduler").glob("*.yaml")}
    expected = options if name == "glob(*)" else {"constant", "cosine"}
    assert len(list((tmp_path / "s").glob("*/result.json"))) == len(expected)
