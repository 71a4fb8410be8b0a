"""How often the best job of a sweep is named rightly, and over-fitting: on lines whose true loss is known."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from benchmarks.report import print_report
from downslope.runs.console import OVERFITTED, overfitting
from downslope.runs.result import Result
from downslope.sweeps.comparison import as_good
from downslope.sweeps.table import Job

Array = NDArray[np.float64]
JUDGING_SEED = 10_000  # the rules were chosen on the seeds from 0 on
SIZES = (40, 60, 100, 200, 442, 1000, 3000)
NUM_RATES = 6
JUDGED = -2  # of the rates, by the other rule: 0.37 × the largest stable one
SOUND = 1.5  # times the training loss at most: no over-fitting
CLEAR = 1.2  # times the lowest true loss: so far above it are all the others


@np.errstate(over="ignore", invalid="ignore")  # some diverge
def rules(num_tables: int) -> None:
    """Prints how both rules do on tables of 40 to 3,000 rows, of which a tenth validates."""
    counts = Counter[str]()
    for seed in range(JUDGING_SEED, JUDGING_SEED + num_tables):
        random = np.random.default_rng(seed)
        rows, num_features = int(random.choice(SIZES)), int(random.choice([1, 3, 10, 20, 40]))
        num_val = max(2, round(rows / 10))
        _train(random, rows - 2 * num_val, num_val, num_features, counts)
    print_report(
        ("rule", "said", "wrongly", "to be said", "of these said"),
        [
            ("best of six rates", *(f"{counts[key]}" for key in ("named", "wrong", "clear", "found"))),
            ("over-fitting", *(f"{counts[key]}" for key in ("said", "false", "over", "right"))),
        ],
        (
            f"{num_tables} tables. A best job is to be named where the true loss of all others is {CLEAR} × as high; "
            f"over-fitting is to be said where the true loss is above {OVERFITTED:g} × the training loss, and wrongly "
            f"said where it is below {SOUND:g} ×, as in {counts['sound']} tables.",
        ),
    )


def _train(random: Generator, num_train: int, num_val: int, num_features: int, counts: Counter[str]) -> None:
    """Trains one line at six rates on a table, by mini-batches, and counts what is said of them."""
    weights = np.append(random.normal(size=num_features) / np.sqrt(num_features), 0.0)
    noise, is_heavy = float(np.exp(random.uniform(np.log(0.1), np.log(1.5)))), random.random() < 0.5

    def draw(rows: int) -> tuple[Array, Array]:
        inputs = np.column_stack([random.normal(size=(rows, num_features)), np.ones(rows)])
        errors = random.standard_t(5, rows) / np.sqrt(5 / 3) if is_heavy else random.normal(size=rows)
        return inputs, inputs @ weights + noise * errors

    inputs, target = draw(num_train)
    val_inputs, val_target = draw(num_val)
    limit = 2 / np.linalg.eigvalsh(2 / num_train * inputs.T @ inputs)[-1]
    rates = limit * np.logspace(-2, np.log10(0.9), NUM_RATES)
    first = random.normal(size=(num_features + 1, 1)) * 0.3
    lines = np.tile(first, (1, NUM_RATES))
    for _ in range(int(random.choice([3, 10, 30, 100]))):
        order = random.permutation(num_train)
        for rows in np.split(order, range(64, num_train, 64)):
            gradient = 2 / len(rows) * inputs[rows].T @ (inputs[rows] @ lines - target[rows, None])
            lines = lines - rates * gradient
    true = _bounded(noise**2 + ((lines - weights[:, None]) ** 2).sum(axis=0))
    train, val = _losses(inputs, target, lines), _losses(val_inputs, val_target, lines)
    first_loss = float(_losses(inputs, target, first)[0])
    jobs = [_job(*losses, num_val, first_loss) for losses in zip(train, val, strict=True)]
    ranked = sorted(jobs, key=lambda job: job.objective)
    is_named, is_best = len(as_good(ranked)) == 1, jobs.index(ranked[0]) == true.argmin()
    is_clear = bool(sorted(true)[1] > CLEAR * true.min())
    counts.update(named=is_named, wrong=is_named and not is_best)
    counts.update(clear=is_clear, found=is_clear and is_named and bool(is_best))
    judged = jobs[JUDGED].result
    assert judged
    is_said, ratio = bool(overfitting(judged)), float(true[JUDGED] / train[JUDGED])
    counts.update(said=is_said, false=is_said and ratio < SOUND, over=ratio > OVERFITTED, sound=ratio < SOUND)
    counts.update(right=is_said and ratio > OVERFITTED)


def _losses(inputs: Array, target: Array, lines: Array) -> Array:
    return _bounded(((inputs @ lines - target[:, None]) ** 2).mean(axis=0))


def _bounded(losses: Array) -> Array:
    return np.where(np.isfinite(losses), losses, np.inf)


def _job(train: float, val: float, num_rows: int, first_loss: float) -> Job:
    metrics: dict[str, Any] = {"train/loss": train, "val/loss": val}
    result = Result(status="completed", monitor="val/loss", mode="min", metrics=metrics, objective=val)
    result.num_validation_rows, result.evidence = num_rows, {"first_loss": first_loss}
    return Job("", Path(), {}, result)
