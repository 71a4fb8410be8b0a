"""Hydra looks for sweepers in this package alone: ours is its own grid, less the jobs that have ended."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override


class MissingJobs(BasicSweeper):
    """Every combination of the swept values whose job has not ended in the sweep's folder yet.

    Args:
        max_batch_size: Jobs that a launcher is given at once.
        params: Overrides that are swept beside those of the command line.
        points: How many values an interval has.
    """

    def __init__(
        self, max_batch_size: int | None = None, params: dict[str, str] | None = None, points: int | None = None
    ) -> None:
        super().__init__(max_batch_size, params)

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        from downslope.sweeps.grid import batches

        assert self.config is not None
        return batches(self.config, max_batch_size)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Composes nothing: the gate has composed each value once, and the launcher composes each job."""
