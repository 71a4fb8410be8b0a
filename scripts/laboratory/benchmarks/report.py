"""What a benchmark prints: a Markdown table, and a line that says where its figures come from."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MISSING = "–"


def print_report(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Prints the table, the notes on how to read it, and machine, versions and command."""
    print(f"| {' | '.join(header)} |")
    print(f"|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    for note in (*notes, provenance()):
        print(f"\n{note}")
    print(flush=True)


def provenance() -> str:
    """Returns machine, versions and command, in one sentence."""
    packages = (
        "torch",
        "lightning",
        "hydra-core",
        "tensorboard",
        "numpy",
        "scikit-learn",
        "scipy",
        "matplotlib",
    )
    versions = [f"{name} {version(name)}" for name in packages if installed(name)]
    machine = f"{_processor()}, {os.cpu_count()} cores, {platform.system()}"
    command = shlex.join(["python", "scripts/laboratory/benchmark.py", *sys.argv[1:]])
    return f"Measured on {machine}, Python {platform.python_version()}, {', '.join(versions)}: `{command}`"


def installed(package: str) -> bool:
    """Tells whether a package is there, without importing it."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    """The processor's name, which Python knows on no system for certain."""
    linux = Path("/proc/cpuinfo")
    lines = linux.read_text().splitlines() if linux.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show_progress(state: str) -> None:
    """Shows on stderr what is being measured: one line, rewritten, where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{state}", end="" if state else "\r", file=sys.stderr, flush=True)
    elif state:
        print(state, file=sys.stderr, flush=True)
