"""Measures the figures that the docs claim: without a name all of them, each in a process of its own."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

BENCHMARKS = {
    "startup": "wall time of a tiny run, beside a bare PyTorch script that does the same",
    "observers": "what observing adds to a run, beside Lightning's grad_norm and beside histograms",
    "verdict": "how often the verdict is right, whether its suggestion helps, and how early it warns",
    "networks": "the same on real networks, and whether planted mistakes are named: half an hour, kept in --folder",
    "rivals": "what other packages say of the same networks; they are installed apart (benchmarks/rivals.py)",
    "rules": "how often the best job of a sweep, and over-fitting, are named rightly",
    "steps": "samples a second, beside a bare loop, a default DataLoader and scikit-learn",
    "checkpoints": "what checkpoints add to a run, and one of their writes taken apart",
    "sweep": "what a sweep of a thousand rates costs at once, and a job one by one",
}
EPILOG = """\
Tables go to stdout as Markdown, progress to stderr. What is compared is measured in turn, A B A B …, and
summed up by medians: on a busy machine the seconds wander, the ratios far less.

examples:
  python scripts/laboratory/benchmark.py > figures.md
  python scripts/laboratory/benchmark.py startup --rounds 15
  python scripts/laboratory/benchmark.py steps --quick
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark that was named, or all of them; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.benchmark is None:
        codes = [subprocess.call([sys.executable, __file__, name, *arguments]) for name in BENCHMARKS]
        return int(any(codes))
    if options.benchmark == "startup":
        from benchmarks.startup import startup

        startup(rounds=options.rounds or (1 if options.quick else 9))
    elif options.benchmark == "observers":
        from benchmarks.observers import CASES, QUICK, observers

        rounds = options.rounds or (1 if options.quick else 5)
        observers(rounds, seconds=0.02 if options.quick else 0.3, cases=QUICK if options.quick else CASES)
    elif options.benchmark == "verdict":
        from benchmarks.verdict import verdict

        verdict(num_runs=32 if options.quick else 240)
    elif options.benchmark == "networks":
        from benchmarks.matrix import matrix
        from benchmarks.mistakes import mistakes
        from benchmarks.networks import Part

        mistakes()
        for part in () if options.quick else get_args(Part):
            matrix(part, options.folder / f"{part}.jsonl")
    elif options.benchmark == "rivals":
        from benchmarks.networks import Part
        from benchmarks.rivals import rivals

        for part in () if options.quick else get_args(Part):
            rivals(part, options.folder / f"{part}.jsonl")
    elif options.benchmark == "rules":
        from benchmarks.rules import rules

        rules(num_tables=300 if options.quick else 2000)
    elif options.benchmark == "checkpoints":
        from benchmarks.checkpoints import checkpoints

        checkpoints(rounds=options.rounds or (1 if options.quick else 9), quick=options.quick)
    elif options.benchmark == "sweep":
        from benchmarks.sweep import at_once, sweep

        at_once(*((16, 1, 4, ["diabetes, SGD"]) if options.quick or options.rounds else (1024, 3, 64)))
        sweep(jobs=options.rounds or (10 if options.quick else 1000))
    else:
        from benchmarks.steps import steps

        steps(rounds=options.rounds or (1 if options.quick else 5), seconds=0.05 if options.quick else 0.5)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    parser.add_argument("benchmark", nargs="?", choices=BENCHMARKS, metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works, measures little")
    parser.add_argument(
        "--rounds", type=_positive, metavar="N", help="how often each thing is measured; jobs of the sweep"
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="where the courses of networks are kept")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
