"""A process of its own, with everything imported already."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork(output: Path, act: Callable[[], Any]) -> int:
    """Does something in a new process, whose number is returned; what that prints is added to a file."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setpgid(0, 0)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115  # not pytest's
        act()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, seconds: float | None = None) -> int:
    """Waits for a process, for so long at most before it is killed; returns its exit code, -9 where it was killed."""
    done = (0, 0)
    if seconds is not None:
        end = time.monotonic() + seconds
        while not (done := os.waitpid(process, os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.002)
        if not done[0]:
            kill(process)
    status = done[1] if done[0] else os.waitpid(process, 0)[1]
    kill(process)  # what it has left behind, such as the workers of one that was killed
    return os.waitstatus_to_exitcode(status)


def kill(process: int) -> None:
    """Kills a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
