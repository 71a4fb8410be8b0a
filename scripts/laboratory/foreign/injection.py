"""A plugin of pytest that lets all observers watch every fit of a test suite, and notes how each test ended.

FOREIGN_OUTCOMES=outcomes.json [FOREIGN_OBSERVED=1] python -m pytest -p foreign.injection …
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer

from foreign.observing import observers

OUTCOMES: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("FOREIGN_OBSERVED"):
        inject()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["FOREIGN_OUTCOMES"]).write_text(json.dumps(OUTCOMES))


def inject() -> None:
    """Adds the observers for the time of a fit: what a test says of the Trainer's callbacks stays true around it."""
    fit = Trainer.fit

    def observed(self: Trainer, *arguments: Any, **named: Any) -> Any:
        own: list[Any] = self.callbacks  # type: ignore[attr-defined]
        with tempfile.TemporaryDirectory() as folder:
            added = observers(Path(folder), progress=False)
            own.extend(added)
            try:
                return fit(self, *arguments, **named)
            finally:
                self.callbacks = [each for each in self.callbacks if each not in added]  # type: ignore[attr-defined]

    Trainer.fit = observed  # type: ignore[method-assign]
