"""Prints the metrics of a run's best checkpoint on its own rows."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from downslope.runs.console import command, metric_lines, refusing, say


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Evaluates the run named by `run`."""
    from downslope.runs.trust import check_local
    from template.prediction import evaluate_run

    with refusing("evaluate"):
        check_local(config.run, "run")
        for line in metric_lines(evaluate_run(Path(config.run), config.trust)):
            say(line)


if __name__ == "__main__":
    command(main, "evaluate")
