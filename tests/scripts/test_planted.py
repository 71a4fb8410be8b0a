"""A short form of `scripts/laboratory/benchmark.py verdict`, on seeds of its own."""

import math
import sys

import pytest

from downslope.verdict import Thresholds, judge
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "laboratory"))

from benchmarks.mistakes import MISTAKES, Mistake, plant
from benchmarks.networks import TASKS
from benchmarks.planted import Run, full_batch, limit, planted, train, truth_without_closed_form
from benchmarks.verdict import UNSTABLE, _num_steps, follow, how_early, is_right

TESTING_SEED = 9_000_000


@pytest.fixture(scope="module")
def runs() -> list[tuple[Run, str, str, str]]:
    """Runs, what they are, and what is said of them with the closed form known, and without."""
    return [
        (run, word, train(run).verdict.word, train(run, closed_form=False).verdict.word)
        for run, word, _ in planted(24, TESTING_SEED)
    ]


@pytest.mark.slow
def test_no_diverging_run_is_missed_and_no_sound_one_accused(runs) -> None:
    for run, word, *said in runs:
        for each in said:
            assert (word in UNSTABLE) == (each in UNSTABLE), run


def test_most_words_are_right(runs) -> None:
    assert sum(is_right(word, known) for _, word, known, _ in runs) >= 0.95 * len(runs)
    assert sum(is_right(truth_without_closed_form(run, word), unknown) for run, word, _, unknown in runs) >= 0.8 * len(
        runs
    )
    assert len({word for _, word, *_ in runs}) >= 5


def test_a_judge_without_thresholds_to_speak_of_would_be_noticed(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.planted.judge", lambda evidence: judge_badly(evidence))
    wrong = sum(not is_right(word, train(run).verdict.word) for run, word, *_ in runs[:12])
    assert wrong >= 3


def judge_badly(evidence):
    return judge(evidence, Thresholds(tolerance=0.5, slow_factor=1e9, bouncing=-0.999999))


@pytest.mark.parametrize("closed_form", [True, False])
def test_the_suggestion_needs_at_most_twice_the_steps_of_the_best_rate(closed_form: bool) -> None:
    for seed in range(TESTING_SEED, TESTING_SEED + 4):
        _, _, ratio = follow(seed, closed_form)
        assert ratio <= 2


def test_the_steps_that_are_counted_exactly_are_those_of_a_real_run() -> None:
    run = next(run for seed in range(100) if (run := full_batch(seed)).details["κ"] < 30)
    run.learning_rate = 0.3 * limit(run)
    steps = int(_num_steps(run, run.learning_rate))
    course = train(run, num_steps=steps + 1, observe=False, follow=True)
    left = [(loss - run.line.loss) / (course.losses[0] - run.line.loss) for loss in course.losses]
    assert left[steps - 2] > Thresholds().tolerance > left[-1]


@pytest.mark.parametrize("ratio", [1.03, 2.0, 10.0])
def test_divergence_is_said_early(ratio: float) -> None:
    said, overflowed = how_early(ratio, closed_form=False, num_runs=2)
    assert said < 0.7 * overflowed
    assert math.isfinite(overflowed)


QUICK = ("softmax before cross-entropy", "gradients summed", "weight decay 5")
LATER = ("shuffled targets", "huge number in a row", "schedule at 0 too early")  # take longer to show


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MISTAKES if name not in LATER],
)
@pytest.mark.filterwarnings("ignore")  # what the mistakes give rise to
def test_a_mistake_planted_on_a_real_network_is_named(name: str) -> None:
    mistake = MISTAKES[name]
    course = plant(TASKS[mistake.tasks[0]], mistake, num_steps=32)
    assert any(mistake.hint in hint for hint in judge(course.seen[-1]).hints)


@pytest.mark.parametrize("name", ["MLP", "regression"])
def test_no_mistake_is_seen_in_a_sound_run(name: str) -> None:
    course = plant(TASKS[name], Mistake("", (name,)), num_steps=32)
    assert judge(course.seen[-1]).hints == ()
