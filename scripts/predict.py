"""Predicts with a run's best checkpoint: a CSV, a column for each thing that the module predicts."""

import sys
from contextlib import nullcontext
from pathlib import Path

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
        with Path(config.output).open("w", newline="") if config.output else nullcontext(sys.stdout) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(map(csv_cell, columns))
            writer.writerows(map(csv_cell, row) for row in zip(*columns.values(), strict=True))
            file.flush()


if __name__ == "__main__":
    command(main, "predict", Path(__file__).parents[1] / "conf")
