"""Prints the metrics of a run's best checkpoint on its own rows."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from downslope.runs.console import command, metric_lines, refusing, say


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Evaluates the run named by `run`."""
    with refusing("evaluate"):
        from downslope.runs.stored import weights_of
        from template.evaluate import evaluate

        for line in metric_lines(evaluate(config)):
            say(line)
        say(f"  of        {weights_of(Path(config.run))}")


if __name__ == "__main__":
    command(main, "evaluate", Path(__file__).parents[1] / "conf")
