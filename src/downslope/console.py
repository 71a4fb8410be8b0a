"""What a person sees: errors in one line, a quiet log, the run in a few lines."""

import atexit
import gc
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downslope.result import Result

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from downslope.data import DataModule

FULL_ERROR = "HYDRA_FULL_ERROR"


def command(main: Callable[[], Any]) -> None:
    """Runs a script's main function: an error becomes one message and exit code 1.

    `HYDRA_FULL_ERROR=1` shows the traceback instead. A process that ends need not be swept: freezing what is
    alive keeps the garbage collector out of the exit, which takes a quarter of a second with torch loaded.
    """
    atexit.register(gc.freeze)
    if wants_traceback():
        main()
        return
    os.environ[FULL_ERROR] = "1"  # Hydra then raises instead of printing
    try:
        main()
    except Exception as error:
        refuse(error)
    finally:
        del os.environ[FULL_ERROR]


def wants_traceback() -> bool:
    """Tells whether the person asked for tracebacks."""
    return os.environ.get(FULL_ERROR) == "1"


def refuse(error: Exception) -> None:
    """Prints what is wrong and leaves with exit code 1."""
    print(f"error: {explain(error)}", file=sys.stderr)
    raise SystemExit(1)


def explain(error: Exception) -> str:
    """Returns what is wrong, in words for the person who typed the command."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    cause = error.__cause__
    if isinstance(error, InstantiationException) and isinstance(cause, Exception):
        key = re.search(r"full_key: (\S+)", str(error))
        message = explain(cause)
        return message if not key or "`" in message else f"`{key[1]}`: {message}"
    if isinstance(error, MissingMandatoryValue):
        return f"`{error.full_key}` must be given, there is no default: {error.full_key}=…"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return "\n".join(line for line in str(error).splitlines() if line.strip())
    if isinstance(error, ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"


class Quiet(logging.Filter):
    """Lets our own warnings through to the terminal, and everything when Hydra was told to be verbose."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tells whether the terminal shows the record."""
        verbose = logging.getLogger().level <= logging.DEBUG
        return verbose or (record.name.startswith("downslope") and record.levelno >= logging.WARNING)


def print_header(config: "DictConfig", datamodule: "DataModule", trainer: "Trainer") -> None:
    """Prints what is about to be trained, in one line."""
    from hydra.core.hydra_config import HydraConfig

    choices = HydraConfig.get().runtime.choices
    table = datamodule.table
    columns = f"{datamodule.num_features} feature{'s' * (datamodule.num_features != 1)}"
    say(
        f'{table.name}: {len(table):,} rows, {columns}, target "{table.target_name}" · '
        f"linear regression ({choices.model}) · {choices.optimizer}, lr {config.lr:g} · "
        f"{trainer.strategy.root_device}"
    )


def print_result(result: Result, folder: Path) -> None:
    """Prints what came of a run, and where to look next."""
    say("")
    losses = _parts(result, "loss", "{:.4f}")
    if result.least_squares_loss and result.excess_loss is not None:
        share = result.excess_loss / result.least_squares_loss
        losses += f"   (least squares {result.least_squares_loss:.4f}: {share:.2%} above)"
    say(f"  loss      {losses}")
    say(f"  R²        {_parts(result, 'r2', '{:.2f}')}")
    if result.learning_rate and result.largest_stable_learning_rate and result.sharpness:
        say(
            f"  rate      {result.learning_rate:g} is "
            f"{result.learning_rate / result.largest_stable_learning_rate:.2g} × the largest stable one for plain "
            f"gradient descent ({result.largest_stable_learning_rate:.4g} = 2/λ, λ = {result.sharpness:.4g})"
        )
    if result.status == "diverged":
        say("  diverged  the loss is no longer a number, or has grown a millionfold: try a smaller lr")
    say("")
    say(f"  run       {_shortest(folder)}")
    say("  look      make dashboard")


def _parts(result: Result, metric: str, form: str) -> str:
    names = {"train": "train", "val": "validation", "test": "test"}
    return "   ".join(f"{name} {form.format(result.metrics[f'{part}/{metric}'])}" for part, name in names.items())


def _shortest(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def say(line: str) -> None:
    """Prints a line at once: what follows may take long, and a pipe may have a reader."""
    print(line, flush=True)
