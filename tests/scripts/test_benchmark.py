import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "laboratory" / "benchmark.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


def table(markdown):
    """Returns the rows of the one table, each as a dictionary by column."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def is_positive(cell):
    return float(cell.replace(",", "")) > 0


def test_startup_measures_every_command_beside_the_bare_script():
    process = run("startup", "--quick")
    assert process.returncode == 0, process.stderr
    rows = table(process.stdout)
    commands = [row.pop("command") for row in rows]
    trains = ["`train.py`", "`train.py ~callbacks.pictures`", "`train.py --help`", "`train.py --cfg job`"]
    assert commands == ["bare script", *trains]
    assert all(is_positive(cell) for row in rows for cell in row.values())
    assert rows[0]["ratio of medians"] == "1.00"
    assert process.stdout.rstrip().endswith("`python scripts/laboratory/benchmark.py startup --quick`")


def test_steps_measures_every_way_in_every_case():
    process = run("steps", "--quick")
    assert process.returncode == 0, process.stderr
    rows = table(process.stdout)
    cases = [(row["features"], row["batch"]) for row in rows]
    assert cases == [(features, batch) for features in ("10", "100", "1000") for batch in ("32", "256", "4096")]
    cells = [cell for row in rows for cell in row.values()]
    assert all(is_positive(cell) for cell in cells if cell != "–")
    assert ("–" in cells) == ("pip install -e .[benchmark]" in process.stdout)
    assert process.stdout.rstrip().endswith("`python scripts/laboratory/benchmark.py steps --quick`")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc, which Linux alone has")
def test_sweep_measures_the_first_the_middle_and_the_last_jobs():
    process = run("sweep", "--rounds", "3")
    assert process.returncode == 0, process.stderr
    at_once, one_by_one = process.stdout.split("\n\n| jobs")
    for row in table(at_once):
        assert float(row["worst difference"]) < 1e-5
        assert sum(int(row[name]) for name in ("of members", "diverged aside", "chaotic aside")) == 4
    rows = table(f"| jobs{one_by_one}")
    assert [row.pop("jobs") for row in rows] == ["1–2", "1–2", "2–3", "1–3"]
    assert all(is_positive(cell) for row in rows for cell in row.values())
    assert "a kept job costs" in process.stdout


def test_checkpoints_measures_runs_with_and_without_and_one_write():
    process = run("checkpoints", "--quick")
    assert process.returncode == 0, process.stderr
    rows = table(process.stdout)
    assert [row["run"] for row in rows] == ["the default run", "MLP, 8,321 parameters"]
    assert all(is_positive(row[name]) for row in rows for name in ("seconds", "writes", "serialise, ms"))
    line, network = (float(row["a write, MB"]) for row in rows)
    assert 8_321 * 3 * 4 / 1e6 < network < 8_321 * 3 * 4 / 1e6 + 0.1  # Adam's three numbers a parameter, of 4 bytes
    assert line < 0.1
    shares = [float(row["two every 30 s"].rstrip("%")) / 100 for row in rows]
    parts = [sum(float(row[f"{part}, ms"]) for part in ("serialise", "SHA-256", "to the disk")) for row in rows]
    assert shares == pytest.approx([2 * part / 30_000 for part in parts], abs=1e-4)


def test_observers_measures_every_way_at_both_frequencies():
    process = run("observers", "--quick")
    assert process.returncode == 0, process.stderr
    rows = table(process.stdout)
    assert [row["model"] for row in rows] == ["line, 10 features"] * 3
    assert [row["steps"] for row in rows] == ["the first 100", "later, every 50", "later, every 1"]
    for row in rows:
        assert is_positive(row["step, processor ms"])
        ways = list(row.items())[4:]
        assert {"ours", "ours and `FlightRecorder`", "`grad_norm` + `log_dict`", "histograms"} < {
            way for way, _ in ways
        }
        assert all(re.fullmatch(r"[+-]\d+ % \([+-]\d+ %\)", added) for _, added in ways)
    assert process.stdout.rstrip().endswith("`python scripts/laboratory/benchmark.py observers --quick`")


@pytest.mark.parametrize("arguments", [["stops"], ["steps", "--rounds", "0"], ["steps", "--rounds", "many"]])
def test_what_cannot_be_measured_is_refused_in_words(arguments):
    process = run(*arguments)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("benchmark.py: error: argument")
    assert not process.stdout


def test_rules_are_judged_on_tables_whose_true_loss_is_known():
    process = run("rules", "--quick")
    assert process.returncode == 0, process.stderr
    rows = table(process.stdout)
    assert [row.pop("rule") for row in rows] == ["best of six rates", "over-fitting"]
    for said, *_, right in (map(int, row.values()) for row in rows):
        assert said >= right > 0
