"""How a sweep ends: what failed is listed, the report made, and the exit code tells the truth."""

import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from downslope.runs.console import explain, say
from downslope.runs.result import FILE_NAME, read_result
from downslope.runs.signals import Interrupted
from downslope.sweeps.job import is_running
from downslope.sweeps.stopping import SweepStop

DIED = "its process died without a word: the same command with hydra.sweep.dir= of this sweep runs it again"


class Ending:
    """Knows what the folder held before the sweep; tells how it ended, also where Hydra leaves without callbacks."""

    def __init__(self, config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.before = self._stamps()
        self.stop = SweepStop(self.folder)

    def finish(self) -> None:
        """Lists the failures, makes the report, and leaves with exit code 1 where any job failed.

        Raises:
            SystemExit: 1, a job has failed; 130 or 143, the sweep was told to stop.
        """
        if self.stop.number:
            self.interrupted()
            self.stop.forget()
            raise Interrupted(self.stop.number)
        failed = self._list_failures()
        report(self.folder)
        if failed:
            raise SystemExit(1)

    def interrupted(self) -> None:
        """Tells how to go on; the jobs that never ran have no `result.json`."""
        self._list_failures()
        report(self.folder)
        arguments = [each for each in sys.argv[1:] if not each.startswith("hydra.sweep.dir=")]
        say("\ninterrupted: what has ended is kept, what was running is saved, the rest was not run. Go on with")
        say(f"  {shlex.join(['python', sys.argv[0], *arguments, f'hydra.sweep.dir={self.folder}'])}")

    def _stamps(self) -> dict[Path, int]:
        """When each job's result was written, or its configuration where it has none."""
        folders = [hydra.parent for hydra in sorted(self.folder.glob("*/.hydra"))]
        files = {folder: folder / FILE_NAME for folder in folders}
        return {
            folder: (file if file.is_file() else folder / ".hydra").stat().st_mtime_ns for folder, file in files.items()
        }

    def _list_failures(self) -> bool:
        """Lists the jobs that failed in this sweep, not in an earlier one over the same folder."""
        failed: dict[str, list[str]] = {}  # often many for one reason
        for folder in [folder for folder, stamp in self._stamps().items() if self.before.get(folder) != stamp]:
            result = read_result(folder)
            if is_running(folder):
                continue  # by another process that shares the sweep
            if result is None:
                failed.setdefault(DIED, []).append(folder.name)
            elif result.status == "failed":
                failed.setdefault((result.error or {}).get("message", ""), []).append(folder.name)
        if failed:
            say(f"\n{sum(map(len, failed.values()))} failed:")
        for message, names in failed.items():
            say("\n    ".join([f"  {message}", *names]))
        return bool(failed)


def report(folder: Path) -> None:
    """Makes the sweep's report; one that cannot be made is told, and changes nothing of what ran."""
    from downslope.sweeps.report import make_report, print_report

    try:
        print_report(make_report(folder))
    except Exception as error:
        print(f"error: the report of {folder} could not be made: {explain(error)}", file=sys.stderr)
