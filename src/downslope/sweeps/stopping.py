"""SIGINT and SIGTERM for a sweep whose jobs run in processes of their own: they save and stop, nobody kills them."""

import os
import secrets
import signal
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from downslope.runs.console import say
from downslope.runs.signals import SIGNALS, STOP_FILE, Interrupted

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # its jobs run in this very process
RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
RAY_MEMORY = 75 * 2**20  # bytes: what the launcher asks for, where Ray would take a third of the machine's


class SweepStop:
    """Passes the first signal on to all jobs, by a file in the sweep's folder; a second one leaves at once.

    A launcher that is left by an exception kills its processes (joblib), leaves them alone (submitit), or both (Ray):
    so it is waited for, and all of them end by themselves. A job that waits in a cluster's queue finds the file later.

    Attributes:
        number: The signal that came, 0 for none.
    """

    def __init__(self, folder: Path) -> None:
        self.number = 0
        self.file = folder / f".stop-{secrets.token_hex(4)}"  # two processes may share a sweep
        self._times = 0

    def listen(self, config: DictConfig) -> None:
        """Takes the signals over, and lets the jobs know the file.

        Ctrl-C reaches every process of the terminal's, and a launcher's own would die of it. What the main thread
        blocks, the processes that it starts block too; so another thread is where SIGINT arrives.

        Args:
            config: Of the sweep, with Hydra's own node; changed in place.
        """
        config.hydra.overrides.hydra.append(f"+hydra.job.env_set.{STOP_FILE}='{self.file}'")
        if config.hydra.launcher._target_ == RAY:
            _start_ray(OmegaConf.to_container(config.hydra.launcher.ray.init, resolve=True))
        if os.name == "posix":
            here, there = socket.socketpair()
            there.setblocking(False)
            signal.set_wakeup_fd(there.detach())
            for number in SIGNALS:
                signal.signal(number, self._take)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            threading.Thread(target=self._pass_on, args=[here], daemon=True).start()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._times += 1
        if self._times > 1:
            raise Interrupted(self.number)

    def _pass_on(self, numbers: socket.socket) -> None:
        """Reads every signal that has come, whatever the main thread waits for, and wakes it for the second."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for (number,) in iter(lambda: numbers.recv(1), b""):
            if number in SIGNALS and self.number:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                return
            if number in SIGNALS:
                self._tell(number)

    def _tell(self, number: int) -> None:
        self.number = number
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(str(int(number)))
        say("\nstopping: what is running saves at its next step, the rest is not run; once more leaves at once")

    def forget(self) -> None:
        """Lets go of the file: all jobs have seen it."""
        self.file.unlink(missing_ok=True)


def _start_ray(settings: Any) -> None:
    """Starts Ray before the launcher would: it puts a SIGTERM handler of its own in place."""
    import ray

    memory = {} if settings.get("address") else {"object_store_memory": RAY_MEMORY}
    ray.init(**{**memory, **settings})
