"""One table, `metrics.csv`, which a run that is gone on with goes on with, too."""

import csv
import io
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from downslope.runs.whole_files import whole_file


class CSVTable(CSVLogger):
    """Lightning's logger, but for what it does to a table that is there: it deletes it.

    Attributes:
        num_rows: How many rows the file holds; before the first is written, how many of those that stand there are
            kept. `Checkpoints` sets it where a run goes on: what comes after them was written by the process that was
            killed, and comes again.
    """

    num_rows = 0
    _has_begun = False
    _experiment: "Writer | None"

    @property
    @rank_zero_experiment
    def experiment(self) -> "Writer":
        """The writer, made when it is first asked for."""
        if self._experiment is None:
            self._experiment = Writer(self.log_dir)
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows that wait."""
        if not (waiting := len(self.experiment.metrics)):
            return
        if not self._has_begun:
            self.num_rows = self.experiment.keep(self.num_rows)
            self._has_begun = True
        super().save()
        self.num_rows += waiting


class Writer(ExperimentWriter):
    """Lightning's, which loses no row where it is killed while it writes the file anew."""

    def _check_log_dir_exists(self) -> None:
        """Leaves the file alone."""

    def keep(self, num_rows: int) -> int:
        """Keeps the first rows of a file that is there, and returns how many there were."""
        file = Path(self.metrics_file_path)
        rows = self._rows(num_rows) if file.is_file() else []
        self.metrics_keys = [key for key in (rows[0] if rows else ()) if any(row[key] for row in rows)]
        if rows:
            self._rewrite(rows)
        else:
            file.unlink(missing_ok=True)
        return len(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._rewrite(self._rows())

    def _rows(self, num_rows: int | None = None) -> list[dict[str, Any]]:
        with Path(self.metrics_file_path).open(newline="") as stream:
            return list(islice(csv.DictReader(stream), num_rows))

    def _rewrite(self, rows: Sequence[dict[str, Any]]) -> None:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, self.metrics_keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        with whole_file(Path(self.metrics_file_path)) as stream:
            stream.write(table.getvalue().encode())
