"""What a person sees: errors in one line, a quiet log, the run in a few lines."""

import atexit
import contextlib
import gc
import logging
import math
import os
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from downslope.runs.command_line import command_line
from downslope.runs.configuration import unknown_key
from downslope.runs.log import FULL
from downslope.runs.plain_files import printable
from downslope.runs.result import Result
from downslope.runs.signals import exit_on_signals

FLIGHT_RECORD = "flight_record.json"  # its own module would bring torch along
FULL_ERROR = "HYDRA_FULL_ERROR"
OVERFITTED = 2.0  # times the training loss
SHOW_TRACEBACK = os.environ.get(FULL_ERROR) == "1"  # read before `command` borrows the variable


def command(main: Callable[[], Any], config_name: str, folder: Path) -> None:
    """Runs a script's main function: an error becomes one message and exit code 1.

    Args:
        main: What `hydra.main` made of the function.
        config_name: The script's primary configuration.
        folder: Where that lies.
    """
    atexit.register(gc.freeze)  # a process that ends need not be swept: a quarter of a second with torch loaded
    exit_on_signals()
    os.environ[FULL_ERROR] = "1"  # Hydra then raises instead of printing
    sys.argv[1:] = map(quoted, flags_first(sys.argv[1:]))
    with refusing(config_name, folder):
        main()


def flags_first(arguments: list[str]) -> list[str]:
    """Returns a command's arguments with its overrides last: Hydra reads no override after a flag that follows one.

    Example:
        >>> flags_first(["lr=0.1,0.2", "-m", "trainer.max_epochs=2"])
        ['-m', 'lr=0.1,0.2', 'trainer.max_epochs=2']
    """
    known, rest = get_args_parser().parse_known_args(arguments)
    overrides = {*known.overrides, *(each for each in rest if not each.startswith("-"))}
    return sorted(arguments, key=lambda argument: argument in overrides)


def quoted(argument: str) -> str:
    """Quotes a value that Hydra's grammar cannot read: with an equals sign, spaces, brackets or other alphabets.

    Example:
        >>> quoted("run=outputs/sweeps/rates/lr=0.01,device=cpu")
        "run='outputs/sweeps/rates/lr=0.01,device=cpu'"
        >>> quoted("data.target=price [EUR]")
        "data.target='price [EUR]'"
        >>> quoted("lr=range(start=1,stop=3)")
        'lr=range(start=1,stop=3)'
    """
    key, separator, value = argument.partition("=")
    if not separator or argument.startswith(("/", "-")):  # --config-path of a sweep's job: no override
        return argument
    in_quotes = f"{key}='{value}'" if "'" not in value else f'{key}="{value}"'
    for candidate in (argument, in_quotes):
        with contextlib.suppress(Exception):  # the grammar's, and its lexer's own
            OverridesParser.create().parse_override(candidate)
            return candidate
    return argument


@contextlib.contextmanager
def refusing(config_name: str, folder: Path | None = None) -> Iterator[None]:
    """Turns an exception into one message (or its traceback, with `HYDRA_FULL_ERROR=1`) and exit code 1."""
    try:
        yield
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _hush()
    except Exception as error:
        if SHOW_TRACEBACK:
            traceback.print_exception(error)
        else:
            print(f"error: {one_line(explain(error, config_name, folder))}", file=sys.stderr)
        raise SystemExit(1) from None


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Lets a run go on that nobody listens to: a terminal that was closed, a full disk behind `>`."""
    try:
        yield
    except OSError as error:
        logging.getLogger(__name__).warning("Cannot print any more; the run continues: %s", error)
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
    return str(printable(" ".join(message.split())))


def explain(error: BaseException, config_name: str = "train", folder: Path | None = None) -> str:
    """Returns what is wrong, in words for the person who typed the command; notes on the error stand behind it."""
    notes = (f" ({note})" for note in getattr(error, "__notes__", ()))
    return _explain(error, config_name, folder) + "".join(notes)


def _explain(error: BaseException, config_name: str, folder: Path | None) -> str:
    if isinstance(error, InstantiationException) and error.__cause__:
        key = re.search(r"full_key: (\S+)", str(error))
        message = explain(error.__cause__)
        if not key:
            return message
        named = re.sub(r"^`(\w+)`", rf"`{key[1]}.\1`", message)  # the class knows its argument, not where it stands
        return named if "`" in named else f"`{key[1]}`: {named}"
    if isinstance(error, MissingMandatoryValue):
        return f"`{error.full_key}` must be given, since it has no default: {error.full_key}=…"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_composition(str(error), config_name, folder)
    if isinstance(error, MemoryError):
        return "There is not enough memory: try a smaller data.batch_size, or a smaller table."
    if isinstance(error, OSError) and error.errno in FULL and not error.filename:  # of a write Python names no file
        return f"A file cannot be written: {error.strerror}."
    if isinstance(error, ValueError | OSError) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _explain_composition(message: str, config_name: str, folder: Path | None) -> str:
    """Hydra's message, shorter; for an unknown key the nearest known one."""
    if unknown := re.search(r"Could not override '(.+)'", message):
        return unknown_key(unknown[1], config_name, folder)
    if "input" in message:  # the grammar's: "mismatched input '='", "no viable alternative at input"
        message = f"Cannot read an override: {message}"
    message = message.partition("Config search path:")[0].partition("See https://hydra.cc")[0]
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines[1:] and lines[1].startswith("Available options"):
        return f"{lines[0]}. {lines[1]} {', '.join(lines[2:])}."
    return " ".join(lines)


@unheard()
def print_header(data: Any, module: Any, trainer: Any, result: Result) -> None:
    """Prints what is about to be trained, in one line."""
    described = data.description() if hasattr(data, "description") else type(data).__name__
    rate = "" if result.learning_rate is None else f", lr {result.learning_rate:g}"
    optimizers = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "no optimizer"
    say(f"{described} · {type(module).__name__} · {optimizers}{rate} · {result.device}")


@unheard()
def print_result(result: Result, folder: Path) -> None:
    """Prints what came of a run, and where to look next."""
    lines = ["", *metric_lines(result.metrics)]
    least, excess = result.least_squares_loss, result.excess_loss
    if least is not None and excess is not None:
        lines.append(f"  optimum   least squares {least:.4g} on the training rows: {_above(least, excess)}")
    if result.learning_rate and result.largest_stable_learning_rate and result.sharpness:
        lines.append(
            f"  rate      {result.learning_rate:g} is "
            f"{result.learning_rate / result.largest_stable_learning_rate:.2g} × the largest stable one for plain "
            f"gradient descent ({result.largest_stable_learning_rate:.4g} = 2/λ, λ = {result.sharpness:.4g})"
        )
    if result.status == "diverged":
        why = result.evidence.get("diverged", "the loss is no longer a number, or has grown a millionfold")
        lines.append(f"  diverged  {why}: try a smaller lr")
        if (folder / FLIGHT_RECORD).is_file():
            lines.append(f"            the last steps before it and its batch: {FLIGHT_RECORD}")
    sentence = result.evidence.get("sentence", "")
    lines += textwrap.wrap(sentence, 118, initial_indent="  verdict   ", subsequent_indent=" " * 12)
    lines += overfitting(result)
    run, again = shortest(folder), ""
    lines += ["", f"  run       {run}"]
    if (folder / "checkpoints" / "best.ckpt").is_file():
        lines.append(f"  best      python scripts/evaluate.py run={run}   (above: the last weights)")
    if override := result.evidence.get("try"):
        others = [each for each in result.overrides if each.partition("=")[0] != override.partition("=")[0]]
        again = f"        again   {shlex.join([*command_line(), *others, override])}"
    say("\n".join([*lines, f"  look      make dashboard{again}"]))


def _above(least: float, excess: float) -> str:
    """How far the last weights are from least squares; of nothing there is no multiple."""
    if least <= 1e-12 or excess >= 1000 * least:
        return f"the last weights are {excess:.4g} above"
    share = excess / least
    return f"the last weights {f'are {100 * share:.2g}% above' if share < 1 else f'have {1 + share:.3g} times that'}"


def overfitting(result: Result) -> list[str]:
    """Returns a line where the validation loss L is more than twice the training loss, and not next to nothing.

    Of n rows L counts as L − L/√n, since their noise may be the reason. How often that is right: docs/verdict.md.

    Example:
        >>> seen = Result("completed", monitor="val/loss", metrics={"train/loss": 0.25, "val/loss": 1.0})
        >>> overfitting(seen)
        ['  overfit   val/loss is 4 × train/loss: more rows, a smaller model or weight decay may help']
        >>> overfitting(Result("completed", monitor="val/loss", metrics={"train/loss": 0.75, "val/loss": 1.0}))
        []
    """
    monitor = result.monitor or ""
    counterpart = f"train/{monitor.partition('/')[2]}"
    train, value = result.metrics.get(counterpart, 0.0), result.metrics.get(monitor, 0.0)
    surely = value * (1 - 1 / math.sqrt(result.num_validation_rows or math.inf))
    is_much = surely > OVERFITTED * train > 0 and value > 0.01 * result.evidence.get("first_loss", 0.0)
    if result.status != "completed" or result.mode != "min" or not is_much:
        return []
    factor = f"{value / train:.2g} ×"
    return [f"  overfit   {monitor} is {factor} {counterpart}: more rows, a smaller model or weight decay may help"]


def print_interrupted(result: Result, folder: Path, saved: bool | None) -> None:
    """Prints how far an interrupted run came, and how to resume it."""
    say("")
    if any((folder / "checkpoints").glob("*.ckpt")):
        what = "saved" if saved else "not saved: the steps since the last checkpoint are lost, and will be taken again"
        say(f"  stopped   at step {result.num_optimizer_steps:,}, {what}")
        say(f"  resume    python scripts/train.py resume={shortest(folder)}")
    else:
        say("  stopped   before anything was saved")


def metric_lines(metrics: Mapping[str, float]) -> list[str]:
    """Returns a line for each metric, over the parts of the data that it was logged for.

    Example:
        >>> metric_lines({"train/loss": 0.5, "val/loss": 0.25, "val/accuracy": 0.9, "temperature": 3.0})
        ['  loss      train 0.5000   val 0.2500', '  accuracy  val 0.9000', '  temperature 3.0000']
    """
    lines: dict[str, list[str]] = {}
    ranks = {"train": 0, "val": 1, "test": 2}
    for tag in sorted(metrics, key=lambda tag: ranks.get(tag.partition("/")[0], len(ranks))):
        part, _, name = tag.partition("/")
        is_part, value = name and part in ranks, metrics[tag]
        figure = f"{value:.4f}" if value == 0 or 0.1 <= abs(value) < 1e6 else f"{value:.4g}"
        lines.setdefault(name if is_part else tag, []).append(f"{part} {figure}" if is_part else figure)
    return [f"  {name:<9} {'   '.join(values)}" for name, values in lines.items()]


def shortest(folder: Path) -> Path:
    """Returns a folder as it is typed where the command was: `hydra.job.chdir` leads away from there."""
    here = Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def say(line: str) -> None:
    """Prints a line at once: what follows may take long, and a pipe may have a reader."""
    print(line, flush=True)
