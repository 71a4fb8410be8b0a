"""A run as data: `result.json`."""

import json
import math
import types
import typing
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from downslope.runs.plain_files import printable, read_bytes
from downslope.runs.whole_files import whole_file

FILE_NAME = "result.json"
EXIT_CODES = {"completed": 0, "failed": 1, "diverged": 3, "interrupted": 130}


@dataclass
class Result:
    """What a run was, and what came of it. A number that is not finite becomes null in the file."""

    status: Literal["completed", "diverged", "failed", "interrupted"]
    verdict: str | None = None  # one word on how the learning rate did
    evidence: dict[str, Any] = field(default_factory=dict)  # the figures that the verdict rests on
    suggested_learning_rate: float | None = None  # to try next
    learning_rate: float | None = None  # the optimizer's at the beginning (a schedule's highest)
    critical_learning_rate: float | None = None  # the least η_c that was seen; see `downslope.gradients`
    largest_stable_learning_rate: float | None = None  # 2/λ, for plain gradient descent on all training rows
    sharpness: float | None = None  # λ, the largest eigenvalue of the Hessian of the training loss
    monitor: str | None = None  # the metric that the run is about
    mode: str = "min"  # whether its least or its greatest value is best
    objective: float | None = None  # that metric, of the last weights
    num_validation_rows: int | None = None  # where its data loader says how many there are
    metrics: dict[str, float] = field(default_factory=dict)  # by tag, all that was logged last, of the last weights
    least_squares_loss: float | None = None  # the least mean squared error of any line, where the task has it
    excess_loss: float | None = None  # of the last weights over the training rows − `least_squares_loss`
    num_optimizer_steps: int = 0
    seconds: float = 0.0  # of the fit alone
    overrides: list[str] = field(default_factory=list)  # as typed
    seed: int | None = None
    device: str | None = None
    error: dict[str, str] | None = None  # type and message
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that matter

    def json(self) -> str:
        """Returns the file's text."""
        return json.dumps(_finite(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            OSError: It cannot be; the message names the file.
        """
        target = folder / FILE_NAME
        try:
            with whole_file(target) as stream:
                stream.write(self.json().encode())
        except OSError as error:
            raise OSError(f"The result cannot be written to {target}: {error.strerror or error}.") from error


def read_result(folder: Path) -> Result | None:
    """Reads a run's result, None where it has none (yet).

    Raises:
        ValueError: The file holds what no run writes; the message names it.
        OSError: It cannot be read.
    """
    content = read_bytes(folder / FILE_NAME)
    if content is None:
        return None
    try:
        values = printable(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{FILE_NAME} is not JSON: {error}") from error
    kinds = _kinds()
    if not isinstance(values, dict) or "status" not in values:
        raise ValueError(f"{FILE_NAME} must have a status.")
    if isinstance(values.get("metrics"), dict):  # null stands for what was not finite
        values["metrics"] = {tag: value for tag, value in values["metrics"].items() if value is not None}
    for name, value in values.items():  # checked here, so that nobody else has to
        if name not in kinds or not _is(value, kinds[name]):
            raise ValueError(f"{FILE_NAME} has a `{name}` that no run writes.")
    return Result(**values)


@cache
def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(Result)


def _is(value: Any, kind: Any) -> bool:
    """Tells whether a value from JSON is what an annotation says; numbers must be finite and have at most 64 bits."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is types.UnionType:
        return any(_is(value, each) for each in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_is(each, inner[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(_is(each, inner[0]) for each in value)
    if kind is float and type(value) is float:
        return math.isfinite(value)
    if kind in (int, float):
        return type(value) is int and -(2**63) <= value < 2**63
    return kind is Any or type(value) is kind


def objective_of(result: Result | None, mode: str = "min") -> float:
    """Returns what a sweeper seeks the least or the most of: the worst there is for a run that has not completed."""
    if result and result.status == "completed" and result.objective is not None:
        return result.objective
    return -math.inf if mode == "max" else math.inf


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
