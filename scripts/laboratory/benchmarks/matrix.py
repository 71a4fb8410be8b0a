"""How often the verdict is right about real networks, whether its suggestion helps, and whether following it ends."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks.networks import METHODS, NUM_STEPS, Course, Courses, Part, pairs
from benchmarks.report import print_report, show_progress
from downslope.verdict import Evidence, Verdict, Word, judge

Truth = Literal["sound", "too slow", "too large"]

LONGER = 3  # a run that is truly too slow, or too large, is not there after so many times the steps either
EARLY = 16
UNSTABLE: tuple[Word, ...] = ("diverging", "too_large", "non_finite")
RIGHT: dict[Truth, tuple[Word, ...]] = {
    "sound": ("converging", "converged"),
    "too slow": ("too_slow",),
    "too large": UNSTABLE,
}
MOST_FOLLOWED = 6


@dataclass(frozen=True)
class Run:
    """One cell of the matrix: a task under an optimizer at one of twelve rates; None where it lies on a border."""

    name: str
    method: str
    rate: float
    course: Course
    truth: Truth | None
    goal: float  # a tenth of the way is left
    quickest: int  # steps to it at the best of the twelve


def matrix(part: Part, file: Path) -> None:
    """Prints what was said of each kind of run, how early, and what came of following it.

    Args:
        part: Which tasks.
        file: Keeps what was trained; what it knows is not trained again.
    """
    torch.set_num_threads(1)
    courses = Courses(file)
    runs = list(runs_of(courses, part))
    show_progress("")
    for with_sharpness in (False, True):
        _print_words(runs, with_sharpness)
    _print_following(courses, runs)


def runs_of(courses: Courses, part: Part) -> Iterator[Run]:
    """Trains each pair at its twelve rates, and says what each is."""
    for name, method in pairs(part):
        show_progress(f"{name}, {method}")
        rates = METHODS[method].rates
        grid = [courses.course(name, method, rate) for rate in rates]
        first, best = grid[0].losses[0], min(course.last for course in grid)
        goal = best + 0.1 * (first - best)
        reached = [steps_to(course, goal) for course in grid]
        quickest = min(reached)
        arrives = [index for index, steps in enumerate(reached) if steps < math.inf]
        for index, course in enumerate(grid):
            gain = (first - course.last) / (first - best)
            truth: Truth | None = None
            if reached[index] <= LONGER * quickest and gain > 0.8:
                truth = "sound"
            elif index < arrives[0] and gain < 0.5:
                truth = "too slow"
            elif index > arrives[-1] and gain < 0.8:
                truth = "too large"
            if truth in ("too slow", "too large") and gain > 0.1:  # below that nobody doubts it
                longer = courses.course(name, method, rates[index], LONGER * NUM_STEPS, observe=False)
                truth = truth if steps_to(longer, goal) == math.inf else None
            yield Run(name, method, rates[index], course, truth, goal, int(quickest))


def steps_to(course: Course, goal: float) -> float:
    """Returns the steps until the mean of ten losses is that low; infinite where it never is."""
    for step in range(len(course.losses)):
        recent = course.losses[max(0, step - 9) : step + 1]
        if sum(recent) / len(recent) <= goal:
            return step + 1
    return math.inf


def _judged(seen: Evidence, with_sharpness: bool) -> Verdict:
    return judge(seen if with_sharpness else replace(seen, sharpness=None))


def _print_words(runs: list[Run], with_sharpness: bool) -> None:
    counts: dict[Truth, Counter[Word]] = defaultdict(Counter)
    early, hinted, notes = 0, 0, []
    for run in runs:
        if run.truth is None:
            continue
        verdicts = [(seen.step, _judged(seen, with_sharpness)) for seen in run.course.seen]
        verdict = verdicts[-1][1]
        counts[run.truth][verdict.word] += 1
        early += run.truth == "too large" and any(step <= EARLY and each.word in UNSTABLE for step, each in verdicts)
        hinted += run.truth == "sound" and bool(verdict.hints)
        if verdict.word not in RIGHT[run.truth] or (run.truth == "sound" and verdict.hints):
            notes.append(f"- {run.name}, {run.method}, lr={run.rate:.3g}, is {run.truth}: “{verdict.sentence}”")
    words = sorted({word for each in counts.values() for word in each})
    rows = []
    for truth, right in RIGHT.items():
        total, num_right = counts[truth].total(), sum(counts[truth][word] for word in right)
        shares = f"{num_right}/{total}, {num_right / total:.1%}"
        rows.append([truth, *(str(counts[truth][word] or "·") for word in words), shares])
    title = f"is \\ said, {'with' if with_sharpness else 'without'} λ"
    early_note = f"Too large, and said within {EARLY} steps: {early} of {counts['too large'].total()}."
    hint_note = f"Sound runs with a hint: {hinted}. On a border, and not counted: {sum(not run.truth for run in runs)}."
    print_report([title, *(f"`{word}`" for word in words), "right"], rows, [f"{early_note} {hint_note}", *notes])


def _print_following(courses: Courses, runs: list[Run]) -> None:
    """Follows each suggestion, and those that come of it, until there is none."""
    first: dict[tuple[Truth, str], list[bool]] = defaultdict(list)
    last: dict[tuple[Truth, str], list[bool]] = defaultdict(list)
    worse, rests, notes = [], [], []
    for run in runs:
        followed = _followed(courses, run)
        rates = [rate for rate, _ in followed]
        ratios = [steps_to(each, run.goal) / run.quickest for _, each in followed]
        way = f"{_details(run)} {' → '.join(f'{rate:.3g}' for rate in rates[1:]) or 'none'}"
        rests.append(len(rates) <= MOST_FOLLOWED)
        if not rests[-1]:
            notes.append(f"- never rests: {way}")
        if len(rates) > 1:
            after = followed[1][1]
            worse.append(after.last > run.course.last + 0.02 * abs(run.course.losses[0] - run.course.last))
            if worse[-1]:
                notes.append(f"- worse: {way}: {run.course.last:.3g} became {after.last:.3g}")
        if run.truth in ("too slow", "too large"):
            first[run.truth, run.method].append(ratios[:2][-1] <= 2)
            last[run.truth, run.method].append(ratios[-1] <= 2)
            if max(ratios[:2][-1], ratios[-1]) > 2:
                notes.append(f"- {way}: {', '.join(f'{ratio:.2f}' for ratio in ratios[1:]) or 'inf'} × the steps")
        show_progress(f"followed: {run.name}, {run.method}")
    show_progress("")
    kinds: list[Truth] = ["too slow", "too large"]
    columns = [(kind, counts) for kind in kinds for counts in (first, last)]
    rows = [[method, *(_share(counts[kind, method]) for kind, counts in columns)] for method in METHODS]
    rows.append(["all", *(_share([each for m in METHODS for each in counts[kind, m]]) for kind, counts in columns)])
    note = f"Of {len(worse)} runs with a suggestion {sum(worse)} end worse by it; "
    note += f"{sum(rests)} of {len(rests)} come to rest."
    title = "within 2 × the steps of the best of twelve rates, from"
    print_report(
        [title, *(f"{kind}, {when}" for kind in kinds for when in ("at once", "at rest"))], rows, [note, *notes]
    )


def _followed(courses: Courses, run: Run) -> list[tuple[float, Course]]:
    """The run, and those that its suggestion and theirs lead to, with their rates; one too many if they do not end."""
    followed = [(run.rate, run.course)]
    while len(followed) <= MOST_FOLLOWED:
        rate = judge(followed[-1][1].seen[-1]).suggestion.learning_rate
        if rate is None:
            break
        followed.append((rate, courses.course(run.name, run.method, rate)))
    return followed


def _share(each: list[bool]) -> str:
    return f"{sum(each)}/{len(each)}, {sum(each) / len(each):.0%}" if each else "·"


def _details(run: Run) -> str:
    return f"{run.name}, {run.method}, {run.truth}, lr={run.rate:.3g} →"
