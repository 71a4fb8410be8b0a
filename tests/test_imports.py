import subprocess
import sys

from tests.conftest import ROOT


def test_the_library_knows_no_template_and_its_arrows_never_turn_back() -> None:
    """The contracts stand in pyproject.toml; in a process of its own, since the linter disables every log."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
