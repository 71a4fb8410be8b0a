"""A sweep as a whole: what its jobs are told, how signals stop them, and how it ends."""

import os
import secrets
import shlex
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from downslope.runs.command_line import COMMAND, command_line
from downslope.runs.console import explain, one_line, say
from downslope.runs.result import FILE_NAME
from downslope.runs.signals import SIGNALS, STOP_FILE, Echo, Interrupted
from downslope.sweeps.grid import sources_digest
from downslope.sweeps.job import SOURCES, is_running, result_of

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
VECTORIZED = "hydra_plugins.downslope_launcher.Vectorized"
IN_THIS_PROCESS = (BASIC, VECTORIZED)  # where their jobs run
RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
RAY_MEMORY = 75 * 2**20  # bytes: what the launcher asks for, where Ray would take a third of the machine's
DIED = "its process died without an error message: the same command with this sweep's hydra.sweep.dir= runs it again"


class Ending:
    """Knows what the folder held before the sweep; tells how it ended, also where Hydra leaves without callbacks.

    With a launcher whose jobs run in processes of their own, it passes the first signal on to all of them, by a file
    in the sweep's folder: they save and stop. A second signal leaves at once. A launcher that is left by an exception
    kills its processes (joblib), leaves them alone (submitit), or both (Ray): so it is waited for. A job that waits in
    a cluster's queue finds the file later.

    Args:
        config: Of the sweep, with Hydra's own node; what the jobs must know is added to their overrides.
    """

    def __init__(self, config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self._before = self._stamps()
        self._number = 0  # of the first signal that came
        self._leaves = False  # whether the next handler raises
        self._stop_file = self.folder / f".stop-{secrets.token_hex(4)}"  # two processes may share a sweep
        command = shlex.join(command_line())
        config.hydra.job.env_set[COMMAND] = command  # for the report, from multirun.yaml
        _tell_jobs(config, COMMAND, command)
        _tell_jobs(config, SOURCES, sources_digest(config))
        config.hydra.overrides.hydra.append("hydra.output_subdir=null")  # a job writes its own, in a folder of its own
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Ray leaves out what several jobs say alike: their results

    def listen(self, config: DictConfig) -> None:
        """Takes the signals over, and lets the jobs know the file.

        Ctrl-C reaches every process of the terminal's, and a launcher's own would die of it. What the main thread
        blocks, the processes that it starts block too; so another thread is where SIGINT arrives.
        """
        _tell_jobs(config, STOP_FILE, str(self._stop_file))
        if config.hydra.launcher._target_ == RAY:  # before the launcher would: it puts a SIGTERM handler in place
            import ray

            settings: Any = OmegaConf.to_container(config.hydra.launcher.ray.init, resolve=True)
            memory = {} if settings.get("address") else {"object_store_memory": RAY_MEMORY}
            ray.init(**{**memory, **settings})
        if os.name == "posix":
            here, there = socket.socketpair()
            there.setblocking(False)
            signal.set_wakeup_fd(there.detach())
            for number in SIGNALS:
                signal.signal(number, self._take)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            threading.Thread(target=self._pass_on, args=[here], daemon=True).start()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._leaves:
            self._leaves = False  # raised once: a launcher that is killing its processes must not be interrupted
            raise Interrupted(self._number)

    def _pass_on(self, numbers: socket.socket) -> None:
        """Reads every signal that has come, whatever the main thread waits for, and wakes it for the second."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        woken = False
        for (number,) in iter(lambda: numbers.recv(1), b""):
            if number not in SIGNALS or woken or Echo.is_one():
                continue
            if self._number:
                woken = self._leaves = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            else:
                self._number = number
                self.folder.mkdir(parents=True, exist_ok=True)
                self._stop_file.write_text(str(int(number)))
                say(
                    "\nstopping: running jobs save at their next step, the others will not start; "
                    "a second signal quits at once"
                )

    def finish(self) -> None:
        """Lists the failures, makes the report, and leaves with exit code 1 where any job failed.

        Raises:
            SystemExit: 1, a job has failed; 130 or 143, the sweep was told to stop.
        """
        if self._number:
            self.interrupted()
            self._stop_file.unlink(missing_ok=True)  # all jobs have seen it
            raise Interrupted(self._number)
        failed = self._list_failures()
        report(self.folder)
        if failed:
            raise SystemExit(1)

    def interrupted(self) -> None:
        """Tells how to resume; the jobs that never ran have no `result.json`."""
        self._list_failures()
        report(self.folder)
        arguments = [each for each in sys.argv[1:] if not each.startswith("hydra.sweep.dir=")]
        say("\ninterrupted: finished jobs are kept, running ones were saved, the others never started. To resume:")
        say(f"  {shlex.join(['python', sys.argv[0], *arguments, f'hydra.sweep.dir={self.folder}'])}")

    def _stamps(self) -> dict[Path, int]:
        """When each job's result was written, or its configuration where it has none."""
        stamps = {}
        for hydra in sorted(self.folder.glob("*/.hydra")):
            result = hydra.with_name(FILE_NAME)
            stamps[hydra.parent] = (result if result.is_file() else hydra).stat().st_mtime_ns
        return stamps

    def _list_failures(self) -> bool:
        """Lists the jobs that failed in this sweep, not in an earlier one over the same folder."""
        failed: dict[str, list[str]] = {}  # often many for one reason
        for folder, stamp in self._stamps().items():
            if self._before.get(folder) == stamp:
                continue
            result = result_of(folder)
            has_ended = result is not None and result.status != "failed"
            if not has_ended and not is_running(folder):  # by another process that shares the sweep
                message = (result.error or {}).get("message", "") if result else DIED
                failed.setdefault(message, []).append(folder.name)
        if failed:
            say(f"\n{sum(map(len, failed.values()))} failed:")
        for message, names in failed.items():
            say("\n    ".join([f"  {one_line(message)}", *map(one_line, names)]))
        return bool(failed)


def report(folder: Path) -> None:
    """Makes the sweep's report; one that cannot be made is told, and changes nothing of what ran."""
    from downslope.sweeps.report import make_report, print_report

    try:
        print_report(make_report(folder))
    except Exception as error:
        print(one_line(f"error: the report of {folder} could not be made: {explain(error)}"), file=sys.stderr)


def _tell_jobs(config: DictConfig, variable: str, value: str) -> None:
    quoted = value.replace("'", r"\'")
    config.hydra.overrides.hydra.append(f"+hydra.job.env_set.{variable}='{quoted}'")
