"""What a person sees: errors in one line, a quiet log, the run in a few lines."""

import atexit
import contextlib
import errno
import gc
import logging
import os
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downslope.runs.result import Result
from downslope.runs.signals import exit_on_signals

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from template.regression.data import DataModule

FLIGHT_RECORD = "flight_record.json"  # its own module would bring torch along
FULL_ERROR = "HYDRA_FULL_ERROR"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what a disk says that takes no more
SHOW_TRACEBACK = os.environ.get(FULL_ERROR) == "1"  # read before `command` borrows the variable


def command(main: Callable[[], Any], config_name: str) -> None:
    """Runs a script's main function: an error becomes one message and exit code 1.

    A process that ends need not be swept: freezing what is alive keeps the garbage collector out of the exit,
    which takes a quarter of a second with torch loaded.

    Args:
        main: What `hydra.main` made of the function.
        config_name: The script's primary configuration.
    """
    atexit.register(gc.freeze)
    exit_on_signals()
    os.environ[FULL_ERROR] = "1"  # Hydra then raises instead of printing
    sys.argv[1:] = map(quoted, sys.argv[1:])
    with refusing(config_name):
        main()


def quoted(argument: str) -> str:
    """Quotes a value that holds an equals sign, which Hydra's grammar wants: a sweep's folders are named by overrides.

    Example:
        >>> quoted("run=outputs/sweeps/rates/lr=0.01,device=cpu")
        "run='outputs/sweeps/rates/lr=0.01,device=cpu'"
        >>> quoted("lr=range(start=1,stop=3)")
        'lr=range(start=1,stop=3)'
    """
    key, _, value = argument.partition("=")
    path = key.startswith(("/", "-"))  # --config-path of a sweep's job: no override
    return f"{key}='{value}'" if "=" in value and not (path or set(value) & set("'\"(${[")) else argument


@contextlib.contextmanager
def refusing(config_name: str) -> Iterator[None]:
    """Turns an exception into one message (or its traceback, with `HYDRA_FULL_ERROR=1`) and exit code 1."""
    try:
        yield
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _hush()
    except Exception as error:
        if SHOW_TRACEBACK:
            traceback.print_exception(error)
        else:
            print(f"error: {one_line(explain(error, config_name))}", file=sys.stderr)
        raise SystemExit(1) from None


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Lets a run go on that nobody listens to: a terminal that was closed, a full disk behind `>`."""
    try:
        yield
    except OSError as error:
        logging.getLogger(__name__).warning("Cannot print any more, the run goes on: %s", error)
        _hush()


def _hush() -> None:
    """Sends what is still printed, and what waits in the buffer, nowhere: else Python exits with 120."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def one_line(message: str) -> str:
    r"""Returns a message in one line that a terminal can show, whatever bytes came in.

    Example:
        >>> one_line("Missing keys:\n\tlinear.weight\x00")
        'Missing keys: linear.weight?'
    """
    words = " ".join(message.split()).encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def explain(error: BaseException, config_name: str = "train") -> str:
    """Returns what is wrong, in words for the person who typed the command."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, InstantiationException) and error.__cause__:
        key = re.search(r"full_key: (\S+)", str(error))
        message = explain(error.__cause__)
        if not key:
            return message
        named = re.sub(r"^`(\w+)`", rf"`{key[1]}.\1`", message)  # the class knows its argument, not where it stands
        return named if "`" in named else f"`{key[1]}`: {named}"
    if isinstance(error, MissingMandatoryValue):
        return f"`{error.full_key}` must be given, there is no default: {error.full_key}=…"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_composition(str(error), config_name)
    if isinstance(error, ValueError | OSError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _explain_composition(message: str, config_name: str) -> str:
    """Hydra's message, shorter; for an unknown key the nearest known one."""
    from downslope.launch.configuration import unknown_key

    if unknown := re.search(r"Could not override '(.+)'", message):
        return unknown_key(unknown[1], config_name)
    if "input" in message:  # the grammar's: "mismatched input '='", "no viable alternative at input"
        message = f"Cannot read an override: {message}"
    message = message.partition("Config search path:")[0].partition("See https://hydra.cc")[0]
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines[1:] and lines[1].startswith("Available options"):
        return f"{lines[0]}. {lines[1]} {', '.join(lines[2:])}."
    return " ".join(lines)


class LogFile(logging.FileHandler):
    """The log of a run: where it cannot be written, training goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Says it, and closes the file's door."""
        self.addFilter(lambda _: False)
        logging.getLogger(__name__).warning("Cannot write %s any more: %s", self.baseFilename, sys.exception())


class Quiet(logging.Filter):
    """Lets our own warnings through to the terminal, and everything when Hydra was told to be verbose.

    That a disk cannot be written is said once a run, by whoever finds it first: loggers, pictures, checkpoints, the
    log. What is lost for good, a result or the last checkpoint, is an error at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._has_told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Tells whether the terminal shows the record."""
        verbose = logging.getLogger().level <= logging.DEBUG
        ours = record.name.startswith("downslope") and record.levelno >= logging.WARNING
        return verbose or (ours and not self._is_told(record))

    def _is_told(self, record: logging.LogRecord) -> bool:
        """Tells whether the record says of the disk what another one has said; adds to the first that it is one."""
        values = record.args if isinstance(record.args, tuple) else ()
        told, full = self._has_told, any(isinstance(each, OSError) and each.errno in FULL for each in values)
        if full and not told:
            record.msg = f"{record.msg} (said once a run: other files may not be written either)"
            self._has_told = True
        return full and told


@unheard()
def print_header(config: "DictConfig", datamodule: "DataModule", trainer: "Trainer") -> None:
    """Prints what is about to be trained, in one line."""
    from hydra.core.hydra_config import HydraConfig

    choices = HydraConfig.get().runtime.choices
    table = datamodule.table
    columns = f"{datamodule.num_features} feature{'s' * (datamodule.num_features != 1)}"
    say(
        f'{table.name}: {len(table):,} rows, {columns}, target "{table.target_name}" · '
        f"linear regression ({choices['model']}) · {choices['optimizer']}, lr {config.lr:g} · "
        f"{trainer.strategy.root_device}"
    )


@unheard()
def print_result(result: Result, folder: Path) -> None:
    """Prints what came of a run, and where to look next."""
    say("")
    loss, *others = metric_lines(result.metrics)
    if result.least_squares_loss and result.excess_loss is not None:
        share = result.excess_loss / result.least_squares_loss
        loss += f"   (least squares {result.least_squares_loss:.4f}: {share:.2%} above)"
    say(loss)
    for line in others:
        say(line)
    if result.learning_rate and result.largest_stable_learning_rate and result.sharpness:
        say(
            f"  rate      {result.learning_rate:g} is "
            f"{result.learning_rate / result.largest_stable_learning_rate:.2g} × the largest stable one for plain "
            f"gradient descent ({result.largest_stable_learning_rate:.4g} = 2/λ, λ = {result.sharpness:.4g})"
        )
    if result.status == "diverged":
        why = result.evidence.get("diverged", "the loss is no longer a number, or has grown a millionfold")
        say(f"  diverged  {why}: try a smaller lr")
        if (folder / FLIGHT_RECORD).is_file():
            say(f"            the last steps before it and its batch: {FLIGHT_RECORD}")
    for line in _verdict_lines(result):
        say(line)
    say("")
    say(f"  run       {_shortest(folder)}")
    say("  look      make dashboard" + _again(result))


def _verdict_lines(result: Result) -> list[str]:
    """Returns the verdict's sentence, in lines that stand under each other."""
    sentence = result.evidence.get("sentence")
    return textwrap.wrap(sentence, 118, initial_indent="  verdict   ", subsequent_indent=" " * 12) if sentence else []


def _again(result: Result) -> str:
    """The command that follows the suggestion, where the sentence makes one."""
    if "Try lr=" not in result.evidence.get("sentence", ""):
        return ""
    others = [override for override in result.overrides if not override.startswith("lr=")]
    rate = f"lr={result.suggested_learning_rate:.3g}"
    return f"        again   {shlex.join(['python', 'scripts/train.py', *others, rate])}"


def print_interrupted(result: Result, folder: Path, saved: bool | None) -> None:
    """Prints how far an interrupted run came, and how to go on with it."""
    say("")
    if any((folder / "checkpoints").glob("*.ckpt")):
        what = "saved" if saved else "not saved: what came after the last checkpoint is lost, and comes again"
        say(f"  stopped   at step {result.num_optimizer_steps:,}, {what}")
        say(f"  go on     python scripts/train.py resume={_shortest(folder)}")
    else:
        say("  stopped   before anything was saved")


def metric_lines(metrics: dict[str, float]) -> list[str]:
    """Returns a line for the loss, for the mean absolute error and for R², each over the three parts."""
    parts = {"train": "train", "val": "validation", "test": "test"}
    rows = {"loss": "loss", "mae": "MAE", "r2": "R²"}
    return [
        f"  {title:<10}" + "   ".join(f"{name} {metrics[f'{part}/{metric}']:.4f}" for part, name in parts.items())
        for metric, title in rows.items()
    ]


def _shortest(folder: Path) -> Path:
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def say(line: str) -> None:
    """Prints a line at once: what follows may take long, and a pipe may have a reader."""
    print(line, flush=True)
