"""What was typed: the command that runs the same configuration, whoever runs it and wherever."""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

COMMAND = "DOWNSLOPE_COMMAND"  # how a sweep tells its jobs, wherever they run, which command it is


def command_line(arguments: Sequence[str] | None = None) -> list[str]:
    """Returns the command of this process, or of its sweep, less its overrides: the script and its flags.

    Flags say which configuration it is, `--config-dir`, `-cn`, `hydra.searchpath=` and so on.

    Args:
        arguments: As in `sys.argv`, which is the default.
    """
    import __main__

    if arguments is None and COMMAND in os.environ:
        return shlex.split(os.environ[COMMAND])
    script, *rest = arguments or sys.argv
    module = getattr(__main__, "__spec__", None)
    overrides = get_args_parser().parse_known_args(rest)[0].overrides
    searched = [each for each in overrides if each.startswith("hydra.searchpath=")]
    flags = [each for each in rest if each not in (*overrides, "-m", "--multirun")]
    return ["python", *(["-m", module.name] if module else [script]), *flags, *searched]


def typed(overrides: Sequence[str]) -> list[str]:
    """Returns overrides as they were typed: `optimizer.lr=${lr}` keeps its interpolation, whose value the job has."""
    plain: Any = OmegaConf.to_container(overrides, resolve=False)
    return list(plain)
