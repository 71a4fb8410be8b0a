"""What a run's best checkpoint says of its own validation and test rows."""

from omegaconf import DictConfig

from downslope.runs.stored import StoredRun, required_passes
from template.train import build


def evaluate(config: DictConfig) -> dict[str, float]:
    """Returns all that the module logs when it is validated and tested with the weights of the best checkpoint.

    Args:
        config: `run` is the run's folder, `trust` what its configuration may name beside what this command's does.
    """
    stored = StoredRun(config)
    data, module, trainer = build(stored.config)
    stored.load(data, module)
    metrics: dict[str, float] = {}
    for evaluation in required_passes(data, module, trainer, "validation", "test"):
        evaluation(module, datamodule=data, verbose=False)
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics
