"""What a run's best checkpoint says: of its own rows, and of new ones."""

from pathlib import Path

import torch
from hydra.utils import instantiate

from downslope.checkpoints import load_module, read_checkpoint, read_configuration
from downslope.data.standardization import Standardization
from downslope.data.table import Array, column_names, read_columns
from downslope.evaluation import evaluate


def evaluate_run(run: Path) -> dict[str, float]:
    """Returns loss, MAE and R² of the best checkpoint on the run's training, validation and test rows, by tag."""
    config = read_configuration(run)
    checkpoint = read_checkpoint(run)
    datamodule = instantiate(config.data, _convert_="all")
    datamodule.setup("test")
    module = load_module(config, checkpoint, datamodule.num_features)
    return {
        f"{part}/{name}": value
        for part, rows in datamodule.parts.items()
        for name, value in evaluate(module, *rows).items()
    }


def predict(run: Path, path: str) -> tuple[str, Array]:
    """Predicts the target of new rows, in its own unit.

    Args:
        run: The run's folder.
        path: A file with the features that the run was trained on, found by name.

    Returns:
        The target's name, and one prediction a row.

    Raises:
        ValueError: A feature is missing, or a cell is not a finite number.
    """
    config = read_configuration(run)
    checkpoint = read_checkpoint(run)
    data = checkpoint["DataModule"]
    names = data["feature_names"]
    missing = [name for name in names if name not in column_names(path)]
    if missing:
        raise ValueError(f"{path} must have the columns that the run was trained on, got no {', '.join(missing)}.")
    features = Standardization.from_state_dict(data["feature_units"]).apply(read_columns(path, names))
    module = load_module(config, checkpoint, len(names))
    with torch.inference_mode():
        predictions = module(features)
    return data["target_name"], Standardization.from_state_dict(data["target_units"]).undo(predictions)
