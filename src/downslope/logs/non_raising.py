"""Logging never stops training: a logger that fails costs itself only, a value that cannot be written costs itself."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from lightning.pytorch.loggers.logger import Logger

log = logging.getLogger(__name__)

METHODS = ("log_hyperparams", "log_graph", "save", "finalize")  # those that Lightning calls, beside `log_metrics`
_OFF: WeakSet[Logger] = WeakSet()
_REFUSED: WeakKeyDictionary[Logger, set[str]] = WeakKeyDictionary()


def non_raising_logger(logger: Logger) -> Logger:
    """Returns the logger, of whose methods none raises any more."""
    each_on_its_own = partial(log_values, logger, logger.log_metrics)
    for name in METHODS:
        setattr(logger, name, partial(attempt, logger, getattr(logger, name)))
    logger.log_metrics = partial(attempt, logger, each_on_its_own)  # type: ignore[method-assign]
    return logger


def attempt(logger: Logger, write: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """Writes; a logger that fails is warned of once, and left alone from then on."""
    if is_off(logger):
        return
    try:
        write(*arguments, **named)
    except Exception as error:
        _OFF.add(logger)
        log.warning("Cannot write to %s any more; training continues: %s", type(logger).__name__, error)


def is_off(logger: Logger) -> bool:
    """Tells whether the logger has failed."""
    return logger in _OFF


def log_values(logger: Logger, write: Callable[..., Any], metrics: Mapping[str, Any], step: int | None = None) -> None:
    """Writes values by a logger's `log_metrics`; where that fails one by one, without those that it refuses.

    Raises:
        Exception: The disk or the network failed, or the logger took no value, whatever its type and size.
    """
    errors = _failures(write, metrics, step)
    if errors and len(metrics) > 1:
        errors = {tag: error for tag in metrics for error in _failures(write, {tag: metrics[tag]}, step).values()}
    for error in errors.values() if len(errors) == len(metrics) else ():
        if not isinstance(error, TypeError | ValueError | ArithmeticError):
            raise error
    told = _REFUSED.setdefault(logger, set())
    for tag in errors.keys() - told:
        log.warning("%s cannot write `%s`, which is left out: %s", type(logger).__name__, tag, errors[tag])
    told.update(errors)


def _failures(write: Callable[..., Any], values: Mapping[str, Any], step: int | None) -> dict[str, Exception]:
    try:
        write(values, step)
    except OSError:
        raise
    except Exception as error:
        return dict.fromkeys(values, error)
    return {}
