"""Predicts a table's target with a run's best checkpoint: a CSV of one column, in the target's own unit."""

import sys
from contextlib import nullcontext
from pathlib import Path

import hydra
from omegaconf import DictConfig

from downslope.runs.console import command, refusing


@hydra.main(version_base="1.3", config_path="../conf", config_name="predict")
def main(config: DictConfig) -> None:
    """Predicts the rows of `data.path` with the run named by `run`."""
    import csv

    from downslope.runs.trust import check_local
    from template.prediction import predict

    with refusing("predict"):
        check_local(config.run, "run")
        target, predictions = predict(Path(config.run), config.data.path, config.trust)
        with Path(config.output).open("w", newline="") if config.output else nullcontext(sys.stdout) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([target])
            writer.writerows([value] for value in predictions.tolist())
            file.flush()


if __name__ == "__main__":
    command(main, "predict")
