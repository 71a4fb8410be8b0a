"""Lightning's own tests, run with all observers in every fit and without: whatever passed must pass again."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def broken(where: str, *arguments: str) -> list[str]:
    """Runs the tests twice.

    Args:
        where: The folder of Lightning's tests, `tests/tests_pytorch` of a checkout, or one of its files or folders.
        arguments: More of pytest's.

    Returns:
        The tests that pass without observers alone, each as a command.
    """
    plain, observed = (run(Path(where).resolve(), arguments, watch) for watch in (False, True))
    passed = [test for test, outcome in plain.items() if outcome == "passed"]
    worse = [test for test in passed if observed.get(test) != "passed"]
    print(f"Lightning's tests: {len(passed)} pass without observers, {len(worse)} of them do not with all observers")
    return [f"{observed.get(test, 'not run')}: {test}" for test in worse]


def run(where: Path, arguments: tuple[str, ...], observed: bool) -> dict[str, str]:
    """Returns how each test ended."""
    root = next(each for each in (where, *where.parents) if each.name == "tests_pytorch")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.json"
        paths = [str(Path(__file__).parents[1]), str(root.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "FOREIGN_OUTCOMES": str(outcomes),
            "FOREIGN_OBSERVED": "1" if observed else "",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "foreign.injection",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
        ]
        subprocess.run([*command, str(where), *arguments], cwd=root, env=environment, check=False)
        return dict(json.loads(outcomes.read_text()))
