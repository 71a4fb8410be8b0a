"""Rebuilds a sweep's report from what its jobs left behind: sweep.csv, learning_rate.png, report.html.

python scripts/report.py                                         the newest sweep below outputs/sweeps
python scripts/report.py outputs/sweeps/2026-11-22_07-15-02_k3fd
"""

import argparse
from pathlib import Path

from downslope.runs.console import refusing
from downslope.sweeps.report import make_report, print_report

SWEEPS = Path("outputs/sweeps")


def newest_sweep() -> Path:
    """Returns the sweep that was begun last.

    Raises:
        ValueError: There is none.
    """
    begun = list(SWEEPS.glob("*/multirun.yaml"))  # Hydra writes it before the first job
    if not begun:
        raise ValueError(f"A sweep's folder must be given, got none, and there is none below {SWEEPS}.")
    return max(begun, key=lambda file: file.stat().st_mtime).parent


def main(arguments: list[str] | None = None) -> None:
    """Makes the report and prints its table."""
    description, _, examples = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=examples, formatter_class=raw)
    parser.add_argument("sweep", type=Path, nargs="?", help="the sweep's folder (the newest below outputs/sweeps)")
    sweep = parser.parse_args(arguments).sweep or newest_sweep()
    print_report(make_report(sweep))


if __name__ == "__main__":
    with refusing("report"):
        main()
