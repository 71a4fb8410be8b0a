"""Hydra looks for launchers in this package alone: ours trains jobs that differ in a few numbers as one."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn


class Vectorized(BasicLauncher):
    """Trains at once the jobs that can be, and runs the others as the basic launcher does."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from downslope.sweeps.vectorized import launch

        assert self.config is not None
        return launch(self.config, job_overrides, initial_job_idx, super().launch)
