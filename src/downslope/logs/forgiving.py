"""Logging never stops training: a logger that fails is warned of once, and left alone from then on."""

import functools
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from lightning.pytorch.loggers.logger import Logger

log = logging.getLogger(__name__)

METHODS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize")  # those that Lightning calls
_SILENT: WeakSet[Logger] = WeakSet()


def forgiving(logger: Logger) -> Logger:
    """Returns the logger, of which no call raises any more."""
    for name in METHODS:
        setattr(logger, name, _guarded(logger, getattr(logger, name)))
    return logger


def silence(logger: Logger, error: Exception) -> None:
    """Warns, once, and makes every later call to the logger do nothing."""
    if logger in _SILENT:
        return
    _SILENT.add(logger)
    log.warning("Cannot write to %s any more, training goes on: %s", type(logger).__name__, error)
    for name in METHODS:
        setattr(logger, name, lambda *arguments, **named: None)


def _guarded(logger: Logger, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except Exception as error:
            return silence(logger, error)

    return call
