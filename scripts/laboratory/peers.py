"""Does observing change anybody's training? Other people's modules, optimizers and Trainer options, two at a time.

python scripts/laboratory/peers.py [--seed 0] [--quick] [--only module=QLearner,optimizer=Adam,option=accumulate]
python scripts/laboratory/peers.py --vouched    # with loss="training_step": measured too is what needs the loss again
LIGHTNING_TESTS=…/pytorch-lightning/tests/tests_pytorch python scripts/laboratory/peers.py
"""

import argparse
import os
import random
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import track

sys.path.insert(0, str(Path(__file__).parent))

from foreign import generative, libraries, lightning_tests, sequences, stateful, supervised, unusual
from foreign.observing import OnDivergence, differences, fit
from foreign.optimizers import OPTIMIZERS
from foreign.options import OPTIONS
from foreign.peer import Peer

MODULES: dict[str, type[Peer]] = {
    kind.__name__: kind
    for family in (supervised, generative, sequences, stateful, unusual, libraries)
    for kind in vars(family).values()
    if isinstance(kind, type) and issubclass(kind, Peer) and kind.__module__ == family.__name__
}


@dataclass(frozen=True, order=True)
class Case:
    """A module, how it is optimized, and under which option of the Trainer."""

    module: str
    optimizer: str
    option: str

    def command(self) -> str:
        """Returns what runs this case alone."""
        only = f"module={self.module},optimizer={self.optimizer},option={self.option}"
        return f"python scripts/laboratory/peers.py --only {shlex.quote(only)}"


@dataclass
class Count:
    """What came of it."""

    tried: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by what Lightning alone says
    failures: list[str] = field(default_factory=list)  # as commands


def pairs(seed: int) -> list[Case]:
    """Returns cases in which every module meets every optimizer and every option, and these meet each other.

    In module i's row the options are those of the first row, moved on by i: so each pair stands somewhere.
    """
    rng = random.Random(seed)
    modules, optimizers, options = (rng.sample(sorted(each), len(each)) for each in (MODULES, OPTIMIZERS, OPTIONS))
    cases = [
        Case(module, optimizers[column % len(optimizers)], options[(column + row) % len(options)])
        for row, module in enumerate(modules)
        for column in range(max(len(optimizers), len(options)))
    ]
    return rng.sample(cases, len(cases))


def short(seed: int) -> list[Case]:
    """Returns some of them in which every module, every optimizer and every option stands once at least."""
    rng = random.Random(seed)
    columns = [rng.sample(sorted(each), len(each)) for each in (MODULES, OPTIMIZERS, OPTIONS)]
    return [Case(*(column[row % len(column)] for column in columns)) for row in range(max(map(len, columns)))]


def chosen(cases: Iterable[Case], only: str) -> list[Case]:
    """Returns the cases that `--only` names: `module=Manual,option=plain`; all three name any case there is."""
    wanted = dict(part.split("=", 1) for part in only.split(",")) if only else {}
    if wanted.keys() >= {"module", "optimizer", "option"}:
        return [Case(**wanted)]
    return [case for case in cases if all(getattr(case, name) == value for name, value in wanted.items())]


def judge(case: Case, count: Count) -> None:
    """Fits one case with all observers and without, and counts what came of it."""
    kind = MODULES[case.module]
    count.tried += 1
    plain = fit(kind, case.optimizer, case.option, observed=False)
    if plain.error and not kind.raises:
        count.skipped[plain.error.splitlines()[0][:120]] += 1
        return
    on_divergence: OnDivergence = "continue" if plain.blew_up() or count.tried % 2 else "stop"
    found = differences(plain, fit(kind, case.optimizer, case.option, True, on_divergence), kind)
    if found and differences(plain, fit(kind, case.optimizer, case.option, observed=False), kind):
        count.skipped[f"{case.module} under {case.optimizer} is not the same twice without observers"] += 1
    elif found:
        count.failures.append(case.command())
        print(f"{case}:", *found, sep="\n    ", flush=True)


def report(count: Count) -> None:
    """Prints what came of the cases, and how to see each failure again."""
    for reason, times in count.skipped.most_common():
        print(f"skipped {times:>4}  {reason}")
    for command in count.failures:
        print(command)
    skipped = count.skipped.total()
    print(f"tried {count.tried}, skipped {skipped} (Lightning alone fails), failures {len(count.failures)}", flush=True)


def main() -> None:
    """Tries the cases, says what came of them, and leaves with 1 where observing changed anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one case a module, instead of all pairs")
    parser.add_argument("--only", default="", help="module=…,optimizer=…,option=…")
    parser.add_argument("--vouched", action="store_true", help="every module's training_step may be called again")
    arguments = parser.parse_args()
    if arguments.vouched:
        Peer.again = "training_step"
    cases = chosen((short if arguments.quick else pairs)(arguments.seed), arguments.only)
    count = Count()
    for case in track(cases, "Fitting…", transient=True):
        judge(case, count)
    report(count)
    broken = lightning_tests.broken(folder) if (folder := os.environ.get("LIGHTNING_TESTS")) else []
    for line in broken:
        print(line)
    sys.exit(int(bool(count.failures or broken)))


if __name__ == "__main__":
    main()
