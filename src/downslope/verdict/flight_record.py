"""`flight_record.json`: the last optimizer steps before a run diverged, and the batch that it diverged on.

JSON has no word for what is not finite: such numbers are the strings "nan", "inf" and "-inf", which say more than null.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

FILE_NAME = "flight_record.json"


@dataclass
class StepRecord:
    """One optimizer step, or one batch that took none (accumulation, a step that a GradScaler skipped).

    Attributes:
        step: t, the optimizer steps taken before it.
        epoch: Epochs before this one.
        batch_index: The batch's place in its epoch.
        optimizer: The optimizer's name; None where no step was taken.
        learning_rate: The optimizer's rate, or those of its parameter groups where there are several.
        loss: The loss that was differentiated for the step: the mean over micro-batches where gradients are
            accumulated; None where the module shows none.
        gradient_norms: By parameter, the L2 norm of the accumulated gradient, before clipping.
        parameter_norms: By parameter, the L2 norm of what the step made of it.
    """

    step: int
    epoch: int
    batch_index: int
    optimizer: str | None = None
    learning_rate: float | list[float] | None = None
    loss: float | None = None
    gradient_norms: dict[str, float] = field(default_factory=dict)
    parameter_norms: dict[str, float] = field(default_factory=dict)


@dataclass
class Diagnosis:
    """Why a step is one that diverged.

    Attributes:
        why: In words.
        reason: What was not finite, the first in the order of the computation; `growth` where all was still finite.
        parameter: The first parameter whose gradient is not finite or, after finite ones, whose value is not.
    """

    why: str
    reason: Literal["loss", "gradient", "parameter", "growth"]
    parameter: str | None = None


@dataclass
class FlightRecord:
    """How a run diverged.

    Attributes:
        diagnosis: Why.
        offending: The step; in the file its values stand beside the diagnosis, not below a key of their own.
        first_loss: The loss of that optimizer's first step, which growth is measured against.
        restored_to_step: The weights are those before this step; None where nothing was taken back.
        steps: The last good steps, oldest first: the last finite values.
        batch: The offending batch, see `as_numbers`.
    """

    diagnosis: Diagnosis
    offending: StepRecord
    first_loss: float | None
    restored_to_step: int | None
    steps: list[StepRecord]
    batch: Any

    def sentence(self) -> str:
        """Returns what happened and when, without a full stop."""
        at = self.offending
        return f"{self.diagnosis.why} at step {at.step} (epoch {at.epoch}, batch {at.batch_index})"

    def json(self) -> str:
        """Returns what the file holds."""
        record = _words(asdict(self))
        record = record.pop("diagnosis") | record.pop("offending") | record
        return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def diagnose(record: StepRecord, first_loss: float | None, diverged_beyond: float) -> Diagnosis | None:
    """Returns what is wrong with a step, None for a good one.

    Args:
        record: The step.
        first_loss: The first loss that was not 0, if there was one.
        diverged_beyond: The loss may grow to so many times the first one.

    Example:
        >>> step = StepRecord(step=3, epoch=0, batch_index=3, loss=0.5, gradient_norms={"w": 1.0, "b": math.inf})
        >>> diagnose(step, first_loss=2.0, diverged_beyond=1e6)
        Diagnosis(why='the gradient of b became inf', reason='gradient', parameter='b')
    """
    loss = record.loss
    gradient = _first_not_finite(record.gradient_norms)
    parameter = _first_not_finite(record.parameter_norms)
    if loss is not None and not math.isfinite(loss):
        culprit = f", and with it the gradient of {gradient}" if gradient else ""
        return Diagnosis(f"the loss became {loss}{culprit}", "loss", gradient or parameter)
    if gradient:
        return Diagnosis(f"the gradient of {gradient} became {record.gradient_norms[gradient]}", "gradient", gradient)
    if parameter:
        return Diagnosis(
            f"a finite gradient made {parameter} {record.parameter_norms[parameter]}", "parameter", parameter
        )
    if loss is not None and first_loss and loss > diverged_beyond * abs(first_loss):
        return Diagnosis(
            f"the loss grew to {loss:.4g}, beyond {diverged_beyond:g} × its first {first_loss:.4g}", "growth"
        )
    return None


def _first_not_finite(norms: dict[str, float]) -> str | None:
    if math.isfinite(sum(norms.values())):
        return None
    return next(name for name, norm in norms.items() if not math.isfinite(norm))


def as_numbers(batch: Any, max_values: int) -> Any:
    """Returns a batch as plain data: dicts, lists, and each tensor as its shape, type and rows.

    A tensor of more than `max_values` elements is cut to as many whole rows as fit (one at least), those that are not
    finite first; `row_numbers` says which they are.

    Example:
        >>> as_numbers({"x": torch.tensor([1.0, 2.0, float("nan")]), "name": "a"}, max_values=2)
        {'x': {'shape': [3], 'dtype': 'float32', 'row_numbers': [0, 2], 'rows': [1.0, nan]}, 'name': 'a'}
    """
    if isinstance(batch, Tensor):
        return _tensor(batch.detach().cpu(), max_values)
    if isinstance(batch, Mapping):
        return {str(key): as_numbers(value, max_values) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [as_numbers(value, max_values) for value in batch[:max_values]]
    return batch if isinstance(batch, str | int | float | bool | None) else f"<{type(batch).__name__}>"


def _tensor(tensor: Tensor, max_values: int) -> dict[str, Any]:
    about = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if tensor.layout != torch.strided or tensor.is_complex():
        return about
    if tensor.ndim == 0 or tensor.numel() == 0:
        return about | {"rows": tensor.tolist()}
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    broken = ~torch.isfinite(rows).all(1)
    num_rows = max(1, max_values // rows.shape[1])
    shown = torch.argsort(broken.int(), descending=True, stable=True)[:num_rows].sort().values
    return about | {"row_numbers": shown.tolist(), "rows": tensor[shown].tolist()}


def _words(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _words(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_words(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
