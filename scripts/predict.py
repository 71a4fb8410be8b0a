"""Predicts with a run's best checkpoint: a CSV, a column for each thing that the module predicts."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import hydra
from omegaconf import DictConfig

from downslope.runs.console import command, refusing


@hydra.main(version_base="1.3", config_path="../conf", config_name="predict")
def main(config: DictConfig) -> None:
    """Predicts with the run named by `run`."""
    import csv

    with refusing("predict"):
        from downslope.runs.plain_files import csv_cell
        from template.predict import predict

        columns = predict(config)
        with _output(config.output) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(map(csv_cell, columns))
            writer.writerows(map(csv_cell, row) for row in zip(*columns.values(), strict=True))
            file.flush()


@contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    """The terminal, or a file that is there whole or not at all."""
    from downslope.runs.whole_files import whole_file

    if path is None:
        yield sys.stdout
        return
    with whole_file(Path(path)) as stream:
        file = io.TextIOWrapper(stream, newline="")
        yield file
        file.detach()


if __name__ == "__main__":
    command(main, "predict", Path(__file__).parents[1] / "conf")
