"""What a run's best checkpoint says: of its own rows, and of new ones."""

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate

from downslope.runs.checkpoints import belonging, load_module, read_checkpoint, read_configuration
from downslope.tables.standardization import Standardization
from downslope.tables.table import Array, column_names, read_columns
from template.regression.evaluation import evaluate_parts


def evaluate_run(run: Path, trusted: Sequence[str] = ()) -> dict[str, float]:
    """Returns loss, MAE and R² of the best checkpoint on the run's training, validation and test rows, by tag.

    Args:
        run: The run's folder.
        trusted: What its configuration may name beside what `downslope.runs.trust` allows.
    """
    config = read_configuration(run, trusted)
    checkpoint = read_checkpoint(run)
    with belonging(run):
        datamodule = instantiate(config.data, _convert_="all")
        datamodule.setup("test")
        module = load_module(config, checkpoint, datamodule.num_features)
        return evaluate_parts(module, datamodule.parts)


def predict(run: Path, path: str, trusted: Sequence[str] = ()) -> tuple[str, Array]:
    """Predicts the target of new rows, in its own unit.

    Args:
        run: The run's folder.
        path: A file with the features that the run was trained on, found by name.
        trusted: What the run's configuration may name beside what `downslope.runs.trust` allows.

    Returns:
        The target's name, and one prediction a row.

    Raises:
        ValueError: A feature is missing, or a cell is not a finite number.
    """
    config = read_configuration(run, trusted)
    checkpoint = read_checkpoint(run)
    available = column_names(path)
    with belonging(run):
        data = checkpoint["DataModule"]
        names, target_name = list(map(str, data["feature_names"])), str(data["target_name"])
        feature_units = Standardization.from_state_dict(data["feature_units"])
        target_units = Standardization.from_state_dict(data["target_units"])
        module = load_module(config, checkpoint, len(names))
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(f"{path} must have the columns that the run was trained on, got no {', '.join(missing)}.")
    columns = read_columns(path, names)
    with belonging(run), torch.inference_mode():
        return target_name, target_units.undo(module(feature_units.apply(columns)))
