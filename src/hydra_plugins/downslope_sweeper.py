"""Hydra looks for sweepers in this package alone: ours is its own grid, less the jobs that have ended."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override


class MissingJobs(BasicSweeper):
    """Every combination of the swept values whose job has not ended in the sweep's folder yet."""

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        from downslope.runs.console import say
        from downslope.sweeps.missing import missing_jobs

        assert self.config is not None
        jobs = missing_jobs(self.config)
        (grid,) = BasicSweeper.split_arguments(overrides, None)
        if kept := len(grid) - len(jobs):
            say(f"kept {kept:,} of {len(grid):,} jobs, which have ended already")
        return [list(batch) for batch in self.split_overrides_to_chunks(jobs, max_batch_size)] if jobs else []

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Composes nothing: the gate has composed each value once, and the launcher composes each job."""
