"""How a sweep ends: what failed is listed, the report made, and the exit code tells the truth."""

import shlex
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from downslope.console import explain, say
from downslope.result import FILE_NAME, read_result

DIED = "its process died without a word: the same command with hydra.sweep.dir= of this sweep runs it again"


class Ending:
    """Knows when the sweep began, and tells how it ended, also where Hydra leaves without its callbacks."""

    def __init__(self, config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.began = time.time()

    def finish(self) -> None:
        """Lists the failures, makes the report, and leaves with exit code 1 where any job failed.

        Raises:
            SystemExit: 1, a job has failed.
        """
        failed = self._failed()
        if failed:
            say(f"\n{len(failed)} failed:")
        for name, message in failed:
            say(f"  {name}: {message}")
        report(self.folder)
        if failed:
            raise SystemExit(1)

    def interrupted(self) -> None:
        """Tells how to go on; the jobs that never ran have no `result.json`."""
        report(self.folder)
        arguments = [each for each in sys.argv[1:] if not each.startswith("hydra.sweep.dir=")]
        say("\ninterrupted: what has ended is kept, what was running is saved, the rest was not run. Go on with")
        say(f"  {shlex.join(['python', sys.argv[0], *arguments, f'hydra.sweep.dir={self.folder}'])}")

    def _failed(self) -> list[tuple[str, str]]:
        """Name and message of the jobs that failed in this sweep, not in an earlier one over the same folder."""
        found = []
        for hydra in sorted(self.folder.glob("*/.hydra")):
            folder = hydra.parent
            file = folder / FILE_NAME
            if (file if file.is_file() else hydra).stat().st_mtime < self.began - 1:
                continue
            result = read_result(folder)
            if result is None:
                found.append((folder.name, DIED))
            elif result.status == "failed":
                found.append((folder.name, (result.error or {}).get("message", "")))
        return found


def report(folder: Path) -> None:
    """Makes the sweep's report; one that cannot be made is told, and changes nothing of what ran."""
    try:
        from downslope.sweeps.report import make_report, print_report  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return
    try:
        print_report(make_report(folder))
    except Exception as error:
        print(f"error: the report of {folder} could not be made: {explain(error)}", file=sys.stderr)
