"""Gives every command folders that somebody evil has prepared, and looks whether anything came of it.

python scripts/laboratory/siege.py [--quick] [--only links] [--seed 0] [--jobs 2]

Each of the folders in attacks.py goes through resume=, evaluate.py, predict.py, report.py and the same sweep again,
some through TensorBoard's reader. All that is written lies below one temporary folder; what listens, listens on
loopback alone.
"""

import argparse
import contextlib
import csv
import importlib
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra.core.plugins
import matplotlib.pyplot as plt
import torch
from attacks import MARKUP, Attack, Ground, attacks
from forked import fork, wait
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from torch.optim.optimizer import register_optimizer_step_post_hook

SCRIPTS = Path(__file__).parents[1]
SECONDS = 600  # a command that takes longer hangs, on a busy machine too
SECONDS_OF_WORK = 60  # one that works for longer is interrupted, as a person would, and ended where it does not listen
MEMORY = 4 * 2**30  # bytes that a command may ask for: an attack must not take the machine along
SECRET = "siege-secret-5f1c"
*JOBS, EVIL_JOB = (  # that have ended well, and one that was interrupted
    f"callbacks=checkpoints,data.batch_size=200,device=cpu,lr={rate},trainer.max_epochs=2"
    for rate in ("0.01", "0.02", "0.04")
)
SWEEP = (
    "-m", "lr=0.01,0.02,0.04", "callbacks=checkpoints", "device=cpu", "trainer.max_epochs=2",
    "data.batch_size=200", "hydra.sweep.dir=../sweep",
)  # fmt: skip
MADE_BY_THE_REPORT = ("sweep.csv", "learning_rate.png", "report.html")
HARMS = {
    "code": "code",
    "touched": "files outside touched",
    "called": "addresses contacted",
    "hung": "hangs",
    "lost": "reports lost",
    "raw": "raw output",
    "died": "crashes",
}
THEIRS = "theirs"  # TensorBoard's own crash over a file: nothing of ours was there to refuse it
RAW_ERROR = re.compile(r"Traceback \(most recent|^error: [`']?\w*(Error|Exception|Interrupt)\b", re.MULTILINE)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
QUICK = {  # of each kind what once came through, and where
    "names: os.system as": "evaluate",
    "names: template.regression.model.LinearRegression.load": "resume",
    "resolvers: ${siege:} as monitor": "predict",
    "paths: callbacks.checkpoints.folder absolute": "resume",
    "links: checkpoints/last.ckpt.partial a file": "resume",
    "links: a job moved": "again",
    "special: train.log a pipe": "resume",
    "addresses: ftp": "resume",
    "sizes: JSON 100,000": "report",
    "sizes: 30,000 overrides": "again",
    "types: checkpoint progress None": "resume",
    "texts: formula in overrides": "report",
    "tags: '!!python/object/apply": "evaluate",
    "pickles: sealed": "predict",
}


@dataclass(frozen=True)
class Command:
    """What a person does with a folder.

    Attributes:
        run: Does it, in a process of its own, with the world's `work/` around it.
        may_change: Which paths of the world it writes.
        of_sweep: Whether it is about the sweep.
    """

    run: Callable[[], Any]
    may_change: Sequence[str] = ()
    of_sweep: bool = False


def script(name: str, *arguments: str) -> None:
    """Runs one of our scripts, as typed."""
    sys.argv = [str(SCRIPTS / f"{name}.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def dashboard() -> None:
    """Reads a folder as TensorBoard does."""
    EventMultiplexer().AddRunsFromDirectory("../run").Reload()


COMMANDS = {
    "resume": Command(partial(script, "train", "resume=../run"), ["run"]),
    "evaluate": Command(partial(script, "evaluate", "run=../run")),
    "predict": Command(partial(script, "predict", "run=../run")),
    "report": Command(partial(script, "report", "../sweep"), [f"sweep/{name}" for name in MADE_BY_THE_REPORT], True),
    "again": Command(partial(script, "train", *SWEEP), ["sweep"], of_sweep=True),
    "dashboard": Command(dashboard),
}


def alone(world: Path, act: Callable[[], Any]) -> tuple[int | None, str]:
    """Does something in a process of its own; returns the exit code, None where it was killed, and what it printed."""
    output = world / "output"
    output.unlink(missing_ok=True)

    def inside() -> None:
        os.chdir(world / "work")
        act()

    code = wait(fork(output, inside), SECONDS)
    said = output.read_text(errors="surrogateescape") if output.exists() else ""
    return None if code == -signal.SIGKILL else code, said


def watch(world: Path) -> None:
    """Arms this process: a call of an address is written down and stopped, a resolver called `siege` leaves a trace."""

    def heard(event: str, values: tuple[Any, ...]) -> None:
        if event not in ("socket.connect", "socket.getaddrinfo"):
            return
        address = values[1] if event == "socket.connect" else values[0]
        if event == "socket.connect" and isinstance(address, str | bytes):  # of this machine's own
            return
        with (world / "called").open("a") as stream:
            stream.write(f"{event} {address}\n")
        raise ConnectionRefusedError("nobody is called during a siege")

    sys.addaudithook(heard)
    OmegaConf.register_new_resolver("siege", lambda *_: (world / "canary").touch(), replace=True)
    os.environ["SIEGE_SECRET"] = SECRET
    sys.path.append(str(world / "importable"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXCPU, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS_OF_WORK, 2 * SECONDS_OF_WORK))


def make_template(root: Path) -> Path:
    """Makes an honest world: a sweep of which one job was interrupted, that job alone, and files that matter."""
    world = root / "template"
    (world / "work").mkdir(parents=True)
    steps = iter(range(1, 1000))

    def interrupt(*_: object) -> None:
        if (world / "sweep" / EVIL_JOB).exists() and next(steps) == 3:  # in its second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    def train() -> None:
        register_optimizer_step_post_hook(interrupt)
        script("train", *SWEEP)

    code, said = alone(world, train)
    if code != 143:
        raise SystemExit(f"the honest sweep has ended with {code}:\n{said}")
    for name in MADE_BY_THE_REPORT:
        (world / "sweep" / name).unlink()
    shutil.copytree(world / "sweep" / EVIL_JOB, world / "run")
    outside = world / "outside" / "folder"
    shutil.copytree(world / "run", outside)
    (outside / "note.txt").write_text("mine")
    (outside.parent / "file.txt").write_text("mine")
    shutil.copytree(outside, world / "work" / "victim")
    (world / "importable").mkdir()
    (world / "importable" / "evil.py").write_text(
        "import os, pathlib\npathlib.Path(os.environ['SIEGE_CANARY']).touch()\ndef Model(*_, **__): pass\n"
    )
    (world / "output").unlink()
    return world


def besiege(attack: Attack, name: str, template: Path, seed: int) -> list[tuple[str, str]]:
    """Tries one attack on one command, in a world of its own; returns the harm that was done, and its traces."""
    command = COMMANDS[name]
    world = Path(tempfile.mkdtemp(dir=template.parent)) / "world"
    shutil.copytree(template, world)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        target = "sweep" if attack.on_sweep else f"sweep/{EVIL_JOB}" if command.of_sweep else "run"
        rng = random.Random(f"{seed} {attack.name}")
        ground = Ground(world / target, world / "outside", world / "canary", listener.getsockname()[1], rng)
        code, said = alone(world, partial(attack.plant, ground))
        if code != 0:
            raise RuntimeError(f"{attack.name} could not be prepared:\n{said}")
        (world / "output").unlink()
        before = snapshot(world, command.may_change)

        def act() -> None:
            os.environ["SIEGE_CANARY"] = str(world / "canary")
            watch(world)
            command.run()

        code, said = alone(world, act)
        harms = list(judge(world, name, code, said, before))
        with contextlib.suppress(BlockingIOError):
            listener.accept()[0].close()
            harms.append(("called", "a connection arrived"))
    shutil.rmtree(world.parent)
    return harms


def judge(world: Path, name: str, code: int | None, said: str, before: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the harm that was done."""
    command = COMMANDS[name]
    if (world / "canary").exists():
        yield "code", "the canary is there"
    if SECRET in said:
        yield "code", "a variable of the environment was read"
    after = snapshot(world, command.may_change)
    changed = sorted(path for path in {**before, **after} if before.get(path) != after.get(path))
    if changed:
        yield "touched", ", ".join(changed)
    if (world / "called").exists():
        yield "called", (world / "called").read_text().splitlines()[0]
    if code is None:
        yield "hung", said[-200:]
    elif code < 0 or code == 70:
        yield THEIRS if name == "dashboard" else "died", f"exit code {code}: {said[-500:]}"
    refused = name == "again" and code == 1 and said.startswith("error: ")  # nothing has run: report.py makes one
    if command.of_sweep and not refused and (reason := loss(world / "sweep")):
        yield "lost", f"{reason}: {said[-300:]}"
    if name != "dashboard" and (wrong := RAW_ERROR.search(said) or CONTROL.search(said)):
        yield "raw", f"{wrong[0]!r} in {said[-500:]!r}"


def loss(sweep: Path) -> str:
    """Tells what is wrong with a sweep's report: all good jobs must be in it, and nothing that does anything."""
    table, page = sweep / "sweep.csv", sweep / "report.html"
    if not (table.is_file() and page.is_file()):
        return "no report"
    with table.open(newline="") as stream:
        cells = list(csv.reader(stream))
    missing = [name for name in JOBS if not any(row[0] == name and "completed" in row for row in cells)]
    if missing:
        return f"without {', '.join(missing)}"
    if any(cell.startswith(("=", "@")) for row in cells for cell in row):
        return "a formula in sweep.csv"
    return "markup in report.html" if MARKUP in page.read_text() else ""


def snapshot(world: Path, may_change: Sequence[str]) -> dict[str, Any]:
    """What everything in the world is and holds, but for what may change."""
    found: dict[str, Any] = {}
    spared = {world / each for each in ("canary", "called", "output")}
    for path, names, files in os.walk(world):
        for name in (*names, *files):
            each = Path(path, name)
            state = each.lstat()
            relative = each.relative_to(world).as_posix()
            regular = stat.S_ISREG(state.st_mode)
            if relative in may_change or each in spared:
                continue
            content = each.read_bytes() if regular and state.st_size < 2**22 else None
            changes = (state.st_size, state.st_mtime_ns, content) if regular else ()
            found[relative] = (stat.S_IFMT(state.st_mode), *changes, each.is_symlink() and str(each.readlink()))
        names[:] = [name for name in names if Path(path, name).relative_to(world).as_posix() not in may_change]
    return found


def tries(attack: Attack) -> list[str]:
    """Which commands the attack is tried on."""
    return [
        name
        for name, command in COMMANDS.items()
        if (attack.dashboard if name == "dashboard" else command.of_sweep or not attack.on_sweep)
    ]


def chosen(only: str, quick: bool) -> list[tuple[Attack, str]]:
    """Returns what was asked for: attacks, each with a command; first each attack once, by the commands in turn."""
    found = [attack for attack in attacks() if only in attack.name]
    turns = [
        ((place - number) % len(tries(attack)), attack, name)
        for number, attack in enumerate(found)
        for place, name in enumerate(tries(attack))
    ]
    every = [(attack, name) for _, attack, name in sorted(turns, key=lambda turn: turn[0])]
    if not quick:
        return every
    return [next((a, n) for a, n in every if a.name.startswith(start) and n == name) for start, name in QUICK.items()]


def prepare() -> None:
    """Imports and finds out what every command needs, once."""
    torch.set_num_threads(1)
    hydra.core.plugins.Plugins.instance()
    plt.switch_backend("agg")
    os.environ["HYDRA_FULL_ERROR"] = "0"
    for name in ("downslope.launch.gate", "downslope.sweeps.report", "template.evaluate", "template.predict"):
        importlib.import_module(name)


def siege(trials: Sequence[tuple[Attack, str]], seed: int, jobs: int) -> Counter[str]:
    """Tries them all, tells of each harm, and counts."""
    prepare()
    count: Counter[str] = Counter()
    root = Path(tempfile.mkdtemp(prefix="downslope-siege-"))
    try:
        template = make_template(root)

        def one(number: int) -> list[tuple[str, str]]:
            return besiege(*trials[number], template, seed)

        for done, (number, harms) in enumerate(in_processes(one, len(trials), jobs), start=1):
            attack, name = trials[number]
            for harm, trace in harms:
                count[harm] += 1
                print(f"\r{HARMS.get(harm, harm)}: {attack.name} → {name}: {trace!r}", flush=True)
            print(f"\r{done}/{len(trials)} ", end="", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return count


def in_processes(function: Callable[[int], Any], count: int, jobs: int) -> Iterator[tuple[int, Any]]:
    """Yields what a function returns for the numbers below `count`, of whose calls so many run at once, as they end."""
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()

    def work(first: int) -> None:
        for number in range(first, count, jobs):
            try:
                results.put((number, function(number)))
            except Exception as error:
                results.put((number, [("died", f"the siege itself: {error}")]))

    workers = [context.Process(target=work, args=(first,)) for first in range(jobs)]
    for worker in workers:
        worker.start()
    for _ in range(count):
        yield results.get()
    for worker in workers:
        worker.join()


def main() -> int:
    """Runs the siege; returns 1 where any harm was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", default="", help="attacks whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one or two of each kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    trials = chosen(arguments.only, arguments.quick)
    count = siege(trials, arguments.seed, arguments.jobs)
    words = ", ".join(f"{word} {count[harm]}" for harm, word in HARMS.items())
    print(
        f"\rtried {len({attack.name for attack, _ in trials})}, {words}; crashes of TensorBoard itself {count[THEIRS]}"
    )
    return int(any(count[harm] for harm in HARMS))


if __name__ == "__main__":
    sys.exit(main())
