"""How often the verdict is right, whether following it helps, and how early it warns."""

import math
from collections import Counter
from dataclasses import replace

import torch

from benchmarks.planted import (
    TOLERANCE,
    Course,
    Descent,
    Run,
    full_batch,
    limit,
    linear,
    mini_batch,
    planted,
    train,
    truth_without_closed_form,
)
from benchmarks.report import print_report, show_progress
from downslope.verdict import WORDS, Word

JUDGING_SEED = 11_000_000  # thresholds were chosen on seeds from 1,000,000 on
UNSTABLE: tuple[Word, ...] = ("diverging", "too_large", "non_finite")
RATES = (1.01, 1.03, 1.1, 1.3, 2.0, 5.0, 10.0)
NUM_RATES = 60
MOST_STEPS = 10_000_000


def verdict(num_runs: int) -> None:
    """Prints the confusion matrices, what was missed, the suggestion followed, and how early divergence is said.

    Args:
        num_runs: Planted runs to judge.
    """
    torch.set_num_threads(1)
    runs = []
    redrawn = 0
    for run, word, draws in planted(num_runs, JUDGING_SEED):
        redrawn += draws
        runs.append((run, word))
        show_progress(f"planted run {len(runs)} of {num_runs}")
    for closed_form in (True, False):
        judged = []
        for run, word in runs:
            expected = word if closed_form else truth_without_closed_form(run, word)
            judged.append((run, expected, train(run, closed_form=closed_form)))
            show_progress(f"judged run {len(judged)} of {num_runs}, {_knowing(closed_form)}")
        show_progress("")
        _print_matrix(judged, closed_form, redrawn)
    _print_following(num_runs // 4)
    _print_mini_batches(num_runs // 8)
    _print_earliness()


def _knowing(closed_form: bool) -> str:
    return "a line's closed form known" if closed_form else "as of any module: λ alone known"


def is_right(truth: Word, said: Word) -> bool:
    """Tells whether the word is the true one; a diverging run that has overflowed may be called either."""
    return said == truth or {truth, said} <= set(UNSTABLE)


def _print_matrix(judged: list[tuple[Run, Word, Course]], closed_form: bool, redrawn: int) -> None:
    counts = Counter((truth, course.verdict.word) for _, truth, course in judged)
    said = [word for word in WORDS if any(counts[truth, word] for truth in WORDS)]
    rows = [
        [f"`{truth}`", *(str(counts[truth, word] or "·") for word in said)]
        for truth in WORDS
        if any(counts[truth, word] for word in WORDS)
    ]
    wrong = [(run, truth, course) for run, truth, course in judged if not is_right(truth, course.verdict.word)]
    missed = sum(truth in UNSTABLE for _, truth, _ in wrong)
    alarms = sum(course.verdict.word in UNSTABLE for _, _, course in wrong)
    families = Counter(run.family for run, _, _ in judged)
    by_family = Counter(run.family for run, _, _ in wrong)
    notes = [
        f"{len(judged)} runs, {_knowing(closed_form)}: {1 - len(wrong) / len(judged):.1%} right; "
        f"{missed} diverging runs missed, {alarms} false alarms. {redrawn} draws on a border were drawn again.",
        "Right by family: "
        + "; ".join(f"{family} {count - by_family[family]}/{count}" for family, count in sorted(families.items())),
        *(
            f"- missed: {run.family}, {_details(run)}, {run.num_steps} steps, is {truth}: “{course.verdict.sentence}”"
            for run, truth, course in wrong
        ),
    ]
    print_report(["is \\ said", *(f"`{word}`" for word in said)], rows, notes)


def _details(run: Run) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in run.details.items())


def _num_steps(run: Run, learning_rate: float, share: float = TOLERANCE) -> float:
    """Steps of gradient descent until the excess is that share of the first, exactly; infinite where it never is."""
    descent = Descent(run)
    energies = 0.5 * descent.curvatures * descent.error**2
    factors = (1 - learning_rate * descent.curvatures) ** 2
    low, high = 0, 1

    def excess(steps: int) -> float:
        return float((energies * factors**steps).sum())

    while excess(high) > share * descent.first:
        low, high = high, 2 * high
        if high > MOST_STEPS:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) > share * descent.first else (low, middle)
    return high


def follow(seed: int, closed_form: bool) -> tuple[Run, float | None, float]:
    """A full-batch run, the rate that its verdict suggests, and how many times the best rate's steps that needs."""
    run = full_batch(seed)
    course = train(run, closed_form=closed_form)
    if any(verdict.word in UNSTABLE for _, verdict in course.verdicts):
        suggested = next(v for _, v in course.verdicts if v.word in UNSTABLE).suggestion.learning_rate
    else:
        suggested = course.verdict.suggestion.learning_rate
    grid = [limit(run) * 10 ** (-3 * index / NUM_RATES) for index in range(1, NUM_RATES + 1)]
    grid += [limit(run) * (1 - 10 ** (-6 * index / NUM_RATES)) for index in range(1, NUM_RATES + 1)]
    best = min(_num_steps(run, rate) for rate in grid)
    return run, suggested, _num_steps(run, suggested or run.learning_rate) / best  # silence: the rate is right


def _print_following(num_runs: int) -> None:
    rows, notes = [], []
    for closed_form in (True, False):
        followed = []
        for index in range(num_runs):
            followed.append(follow(JUDGING_SEED + 100_000 + index, closed_form))
            show_progress(f"suggestion {index + 1} of {num_runs} followed, {_knowing(closed_form)}")
        ratios = sorted(ratio for _, _, ratio in followed)
        within = sum(ratio <= 2 for ratio in ratios)
        rows.append(
            [_knowing(closed_form), str(num_runs), str(within), f"{ratios[len(ratios) // 2]:.2f}", f"{ratios[-1]:.2f}"]
        )
        notes += [
            f"- beyond: {_details(run)}: suggested {rate}, {ratio:.3g} ×" for run, rate, ratio in followed if ratio > 2
        ]
    show_progress("")
    header = ["gradient descent on all rows", "runs", "within 2 × the best rate's steps", "median", "worst"]
    print_report(
        header, rows, [f"Steps until {TOLERANCE:.1%} of the excess is left; best of {2 * NUM_RATES} rates.", *notes]
    )


def _print_mini_batches(num_runs: int) -> None:
    """Follows the suggestion on mini-batches: does the loss end lower than it did, and does any run diverge?"""
    outcomes: Counter[str] = Counter()
    notes = []
    for index in range(num_runs):
        run = mini_batch(JUDGING_SEED + 200_000 + index)
        run.decays = False
        before = train(run, follow=True)
        suggested = before.verdict.suggestion.learning_rate
        word = before.verdict.word
        if suggested is None:
            outcomes["no suggestion"] += 1
            continue
        after = train(replace(run, learning_rate=suggested), num_steps=2 * run.num_steps, observe=False, follow=True)
        outcome = _outcome(run, before, after)
        outcomes[outcome] += 1
        if outcome in ("diverged", "higher"):
            notes.append(
                f"- {outcome}: {_details(run)}, was {word}, suggested {suggested / limit(run):.3g} × the limit"
            )
        show_progress(f"mini-batch suggestion {index + 1} of {num_runs} followed")
    show_progress("")
    print_report(
        ["suggestion followed on mini-batches, for twice the steps", "runs"],
        [[name, str(count)] for name, count in outcomes.most_common()],
        ["Higher, lower: excess loss at the end, mean of the last quarter, by more than a tenth.", *notes],
    )


def _outcome(run: Run, before: Course, after: Course) -> str:
    def ends_at(course: Course) -> float:
        last = course.losses[-max(1, len(course.losses) // 4) :]
        return sum(last) / len(last) - run.line.loss if course.first_non_finite is None else math.inf

    old, new = ends_at(before), ends_at(after)
    if not math.isfinite(new) or new > 10 * after.losses[0]:
        return "diverged"
    return "lower" if new < 0.9 * old else "the same" if new < 1.1 * old else "higher"


def _print_earliness() -> None:
    rows = []
    for ratio in RATES:
        for closed_form in (True, False):
            said, overflowed = how_early(ratio, closed_form)
            rows.append([f"{ratio:g}", _knowing(closed_form), f"{said}", f"{overflowed:,}"])
        show_progress(f"how early, {ratio:g} × the limit")
    show_progress("")
    header = ["η ÷ limit", "", "`diverging` said after step", "first non-finite loss at step"]
    note = "Gradient descent on all rows, condition number 100: of five runs the one with the least time between."
    print_report(header, rows, [note])


def how_early(ratio: float, closed_form: bool, num_runs: int = 5) -> tuple[int, int]:
    """Returns when `diverging` was said and when a loss overflowed, of the run with the least time between."""
    pairs = []
    for seed in range(num_runs):
        run = linear(JUDGING_SEED + 300_000 + seed, 100.0)
        run = replace(run, learning_rate=ratio * limit(run), num_steps=20_000)
        course = train(run, closed_form=closed_form)
        assert course.first_non_finite is not None
        pairs.append((course.first_diverging or course.first_non_finite, course.first_non_finite))
    return max(pairs, key=lambda pair: pair[0] / pair[1])
