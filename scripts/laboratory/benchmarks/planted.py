"""Runs whose verdict is known beforehand: from the exact spectrum, or because a mistake was planted.

What a run truly is, is decided apart from what the verdict looks at: the excess loss of a line is followed in float64
through the eigen-directions of its Hessian (or, for mini-batches and Adam, through a float64 copy of the run), and on,
for twenty times as long. A draw that lies on a border between two words is drawn again: there no word is wrong.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from downslope.gradients.curvature import Hessian, largest_eigenvalue
from downslope.gradients.least_squares import LeastSquares, least_squares
from downslope.tables.synthetic import synthetic_table
from downslope.verdict import Evidence, EvidenceCollector, Thresholds, Verdict, Word, judge

NUM_ROWS = 64
TOLERANCE = Thresholds().tolerance
FAR = 20  # what is left of a line is followed for so many times the steps
NEAR = 5  # … of a network
BETA = 0.9


@dataclass
class Run:
    """A training, planted.

    Attributes:
        family: What kind it is, for the table.
        module: Its start, in float32.
        make_optimizer: Of its parameters.
        decays: Whether the rate falls to nothing along a cosine.
        mistake: Changes the cycle: `accumulate` never forgets a gradient, `sum` makes it five times too long.
    """

    family: str
    seed: int
    features: Tensor
    target: Tensor
    module: nn.Module
    learning_rate: float
    num_steps: int
    method: str = "sgd"
    batch_size: int = NUM_ROWS
    decays: bool = False
    mistake: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_line(self) -> bool:
        """Tells whether a closed form describes it."""
        return isinstance(self.module, nn.Linear)

    @property
    def line(self) -> LeastSquares:
        """The closed form of its data."""
        return least_squares(self.features, self.target)


@dataclass
class Course:
    """How a run went: the full data's loss by step, the verdicts, and where it stopped."""

    losses: list[float]
    verdicts: list[tuple[int, Verdict]]
    first_non_finite: int | None
    module: nn.Module
    evidence: Evidence | None = None

    @property
    def verdict(self) -> Verdict:
        """The last one."""
        return self.verdicts[-1][1]

    @property
    def first_diverging(self) -> int | None:
        """The step at which it was first said."""
        said = [step for step, verdict in self.verdicts if verdict.word in ("diverging", "too_large", "non_finite")]
        return said[0] if said else None


def optimizer_of(run: Run, parameters: list[nn.Parameter]) -> Optimizer:
    """Makes the run's optimizer."""
    if run.method == "adam":
        return Adam(parameters, lr=run.learning_rate)
    return SGD(parameters, lr=run.learning_rate, momentum=BETA if run.method == "momentum" else 0.0)


def batches(run: Run) -> Iterator[Tensor]:
    """Yields row numbers for ever, shuffled anew each epoch; all rows in order where a batch holds them all."""
    generator = torch.Generator().manual_seed(run.seed)
    while True:
        order = torch.arange(NUM_ROWS)
        if run.batch_size < NUM_ROWS:
            order = torch.randperm(NUM_ROWS, generator=generator)
        yield from order.split(run.batch_size)


def train(
    run: Run,
    dtype: torch.dtype = torch.float32,
    num_steps: int | None = None,
    observe: bool = True,
    closed_form: bool = True,
    follow: bool = False,
) -> Course:
    """Trains a copy of the run, and judges it as the callback does.

    Args:
        run: The run.
        dtype: Of data and weights.
        num_steps: Steps; the run's own without.
        observe: Whether to judge.
        closed_form: Whether a line's closed form is known to the judge, or λ alone.
        follow: Whether to note the full data's loss at every step.
    """
    steps = num_steps or run.num_steps
    module = deepcopy(run.module).to(dtype)
    features, target = run.features.to(dtype), run.target.to(dtype)
    held = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(run, held)
    schedule = CosineAnnealingLR(optimizer, run.num_steps) if run.decays else None
    course = Course([], [], None, module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    frozen = {name: p.numel() for name, p in module.named_parameters() if not p.requires_grad}
    full = run.batch_size == NUM_ROWS
    collector = EvidenceCollector(optimizer, names, full_batch=full, last_step=steps) if observe else None
    if collector and closed_form and run.is_line:
        collector.set_line(run.line, list(module.parameters()), TOLERANCE)
    sharpness = _sharpness(run) if observe else None
    for step, rows in zip(range(steps), batches(run), strict=False):
        loss = _backward(run, module, optimizer, features[rows], target[rows], collector)
        optimizer.step()
        value = loss.item()
        if follow:
            course.losses.append(value if full else _loss(module, features, target).item())
        if collector:
            collector.add_step()
            collector.add_loss(loss)
            if collector.is_due:
                course.evidence = collector.evidence(frozen, sharpness)
                course.verdicts.append((step + 1, judge(course.evidence)))
        if schedule:
            schedule.step()
        if not math.isfinite(value):
            course.first_non_finite = step
            if collector and not collector.is_due:
                course.verdicts.append((step + 1, judge(collector.evidence(frozen, sharpness))))
            break
    return course


def _backward(
    run: Run, module: nn.Module, optimizer: Optimizer, features: Tensor, target: Tensor, collector: Any
) -> Tensor:
    """zero_grad, forward, backward, and what was planted."""
    if run.mistake != "accumulate":
        optimizer.zero_grad()
    loss = _loss(module, features, target)
    if collector and collector.is_watching:
        collector.add_backward()
    if run.mistake == "detach":
        return loss.detach()
    (5 * loss if run.mistake == "sum" else loss).backward()
    return loss


def _loss(module: nn.Module, features: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(module(features).squeeze(-1), target)


def _sharpness(run: Run) -> float:
    """λ at the start, as a SharpnessMonitor has it."""
    if run.is_line:
        return run.line.sharpness
    module = deepcopy(run.module)
    hessian = Hessian(_loss(module, run.features, run.target), [p for p in module.parameters() if p.requires_grad])
    generator = torch.Generator().manual_seed(0)
    return largest_eigenvalue(hessian.product, torch.randn(hessian.num_rows, generator=generator), 12).value


def limit(run: Run) -> float:
    """The largest stable rate of full batches."""
    return (1 + (BETA if run.method == "momentum" else 0.0)) * 2 / _sharpness(run)


# --- what a run truly is ----------------------------------------------------------------------------------------------


@dataclass
class Descent:
    """A line's descent on all rows, in the eigen-directions, in float64: excess loss and gradient."""

    run: Run

    def __post_init__(self) -> None:
        line = self.run.line
        assert isinstance(self.run.module, nn.Linear)
        start = torch.cat([p.detach().reshape(-1) for p in self.run.module.parameters()]).double()
        self.curvatures = line.eigenvalues.numpy()
        self.error = (line.eigenvectors.T @ (start - line.parameters)).numpy()
        self.first = self.excess

    @property
    def excess(self) -> float:
        """½ Σ λᵢ cᵢ²."""
        return float(0.5 * (self.curvatures * self.error**2).sum())

    def go(self, num_steps: int, rate: Callable[[int], float]) -> Iterator[np.ndarray]:
        """Takes steps of momentum (β = 0 without), and yields each gradient."""
        beta = BETA if self.run.method == "momentum" else 0.0
        if not hasattr(self, "velocity"):
            self.velocity = np.zeros_like(self.error)
        for step in range(num_steps):
            gradient = self.curvatures * self.error
            self.velocity = beta * self.velocity + gradient
            self.error = self.error - rate(step) * self.velocity
            yield gradient


def truth(run: Run) -> Word | None:
    """Returns what a run is, None where it lies on a border."""
    if run.mistake in ("detach", "dead", "frozen"):
        return "stalled"
    if run.mistake or run.method == "adam" or run.batch_size < NUM_ROWS or not run.is_line:
        return _truth_by_running_on(run)
    return _truth_by_the_spectrum(run)


def truth_without_closed_form(run: Run, word: Word) -> Word:
    """Returns what a run is to somebody who knows its gradients alone, given what it is.

    Weights that are frozen are so on purpose, and only the closed form knows what they keep: the bias, along which the
    curvature of a mean squared error is 2, arrives by itself.
    """
    if run.mistake != "frozen":
        return word
    return "converged" if abs(1 - 2 * run.learning_rate) ** (2 * run.num_steps) < TOLERANCE else "converging"


def _losses_of_a_line(run: Run, num_steps: int) -> np.ndarray:
    """The full data's loss at every step, from the normal equations of each batch, in float64."""
    features = np.hstack([run.features.double().numpy(), np.ones((NUM_ROWS, 1))])
    target = run.target.double().numpy()
    weights = np.concatenate([p.detach().reshape(-1).double().numpy() for p in run.module.parameters()])
    moment, square, gradient, losses = np.zeros_like(weights), np.zeros_like(weights), np.zeros_like(weights), []
    scale, keep = (5.0 if run.mistake == "sum" else 1.0), float(run.mistake == "accumulate")
    rate = _rate(run)
    for step, rows in zip(range(num_steps), (rows.numpy() for rows in batches(run)), strict=False):
        losses.append(float(np.square(features @ weights - target).mean()))
        if not math.isfinite(losses[-1]) or losses[-1] > 1e200:
            break
        inputs = features[rows]
        gradient = keep * gradient + scale * 2 / len(rows) * inputs.T @ (inputs @ weights - target[rows])
        if run.method == "adam":
            moment, square = 0.9 * moment + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            direction = moment / (1 - 0.9 ** (step + 1)) / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
        else:
            direction = moment = (BETA if run.method == "momentum" else 0.0) * moment + gradient
        weights = weights - rate(step) * direction
    return np.array(losses)


def _rate(run: Run) -> Callable[[int], float]:
    if not run.decays:
        return lambda step: run.learning_rate
    return lambda step: run.learning_rate * (1 + math.cos(math.pi * min(step, run.num_steps) / run.num_steps)) / 2


def _truth_by_the_spectrum(run: Run) -> Word | None:
    ratio = run.learning_rate / limit(run)
    if ratio > 1 and not run.decays:
        return "diverging"
    descent = Descent(run)
    gradients = list(descent.go(run.num_steps, _rate(run)))
    left = descent.excess / descent.first
    if left < TOLERANCE / 2:
        return "converged"
    if left < 2 * TOLERANCE:
        return None
    cosine = np.mean([_cosine(*pair) for pair in zip(gradients[-8:-1], gradients[-7:], strict=True)])
    if cosine < -0.7:
        return "oscillating"
    if cosine < -0.3:
        return None
    if run.decays:
        return "too_slow"  # the rate is 0 now, and the error is not
    if 0.05 < ratio < 0.2:
        return None
    if ratio >= 0.2:
        flattest = _steps_of_the_flattest(descent, run)
        # Exactly on a border of 1000 × there is no wrong word.
        return "converging" if flattest < 300 else "too_slow" if flattest > 3000 else None
    for step, _ in enumerate(descent.go(FAR * run.num_steps, _rate(run))):
        if descent.excess < TOLERANCE * descent.first:
            return "converging" if step < 5 * run.num_steps else None
    return "too_slow"


def _steps_of_the_flattest(descent: Descent, run: Run) -> float:
    """Steps until the excess has arrived, from the eigenvalues alone, in units of the steps taken.

    Momentum is as quick as gradient descent at η/(1 − β) in the flat directions, which are the last.
    """
    rate = run.learning_rate / (1 - BETA if run.method == "momentum" else 1.0)
    energies = 0.5 * descent.curvatures * descent.error**2
    steps = np.geomspace(1, 1e9, 400)
    left = [(energies * np.exp(-2 * np.minimum(rate * descent.curvatures, 1.0) * step)).sum() for step in steps]
    reached = np.flatnonzero(np.array(left) < TOLERANCE * descent.first)
    return float(steps[reached[0]] / run.num_steps) if len(reached) else math.inf


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / math.sqrt((one @ one) * (other @ other)))


def _truth_by_running_on(run: Run) -> Word | None:
    """Of mini-batches, Adam, networks and mistakes: a float64 copy of the run, and where it goes afterwards."""
    if run.is_line:
        losses = _losses_of_a_line(run, run.num_steps * (1 if run.decays else FAR))
    else:
        losses = np.array(train(run, torch.float64, NEAR * run.num_steps, observe=False, follow=True).losses)
    first = losses[0]
    if not np.isfinite(losses).all() or losses[-1] > 1e3 * first:
        now = losses[min(run.num_steps, len(losses)) - 1]
        # It has to have begun to be seen: where chance holds it for long, nothing is to be seen yet.
        return "diverging" if not math.isfinite(now) or now > 10 * first else None
    if losses[: run.num_steps].max() > 100 * first:
        return None  # it went up and came back
    optimum = run.line.loss if run.is_line else min(losses.min(), losses[-run.num_steps :].mean())
    excess = losses - optimum
    quarter = run.num_steps // 4
    earlier, later = (
        excess[run.num_steps - 2 * quarter : run.num_steps - quarter],
        excess[run.num_steps - quarter : run.num_steps],
    )
    left = later.mean() / excess[0]
    if left < TOLERANCE / 2:
        return "converged"
    if left < 2 * TOLERANCE:
        return None
    far = excess[-quarter:].mean() / later.mean()  # how much of what is left is there after FAR times the steps
    falls = later.mean() / earlier.mean()
    ratio = run.learning_rate / limit(run) if run.method != "adam" else None
    if run.decays:
        return None
    if falls > 0.9 and far > 0.7:
        return "oscillating" if (ratio or 1) > 0.05 else None
    if far > 0.3 and (ratio is None or ratio < 0.05) and falls > 0.8:
        return "too_slow"
    reached = np.flatnonzero(excess < TOLERANCE * excess[0])
    if falls < 0.8 and (ratio or 1) > 0.15 and far < 0.3:
        return "converging"
    if ratio is not None and ratio < 0.05 and (not len(reached) or reached[0] > 15 * run.num_steps) and falls < 1:
        return "too_slow"
    return None


# --- drawing ----------------------------------------------------------------------------------------------------------


def linear(seed: int, condition_number: float | None = None) -> Run:
    """A line on synthetic data: condition number 1 to 1e6, 2 to 8 features."""
    random = np.random.default_rng(seed)
    kappa = condition_number or float(10 ** random.uniform(0, 6))
    table = synthetic_table(NUM_ROWS, int(random.integers(2, 9)), float(10 ** random.uniform(-3, 0)), kappa, seed)
    features = torch.tensor(table.features, dtype=torch.float32)
    torch.manual_seed(seed)
    module = nn.Linear(features.shape[1], 1)
    target = torch.tensor(table.target, dtype=torch.float32)
    if random.random() < 0.6:
        _spread_error(module, least_squares(features, target), random)
    return Run("", seed, features, target, module, 0.0, int(random.choice([60, 120, 250])), details={"κ": kappa})


def _spread_error(module: nn.Linear, line: LeastSquares, random: np.random.Generator) -> None:
    """Starts where every eigen-direction holds a like share of the excess loss: the flat ones matter."""
    along = torch.tensor(random.standard_normal(len(line.eigenvalues))) / line.eigenvalues.sqrt()
    start = line.parameters + line.eigenvectors @ along
    with torch.no_grad():
        module.weight.copy_(start[:-1])
        module.bias.copy_(start[-1:])


def network(seed: int) -> Run:
    """A small network on data of another one."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    width = int(random.integers(4, 17))
    features = torch.randn(NUM_ROWS, int(random.integers(2, 6)))
    teacher = nn.Sequential(nn.Linear(features.shape[1], 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        target = 2 * teacher(features).squeeze(-1) + 0.1 * torch.randn(NUM_ROWS)
    activation = nn.Tanh() if random.random() < 0.5 else nn.ReLU()
    module = nn.Sequential(nn.Linear(features.shape[1], width), activation, nn.Linear(width, 1))
    return Run("", seed, features, target, module, 0.0, int(random.choice([120, 200, 350])), details={"width": width})


def _above(random: np.random.Generator) -> float:
    return float(random.choice([1.01, 1.03, 1.1, 1.3, 2.0, 5.0, 10.0]))


def _ratio(random: np.random.Generator) -> float:
    """η over the limit: above it, at its edge, well below it, far below it."""
    kinds = [_above(random), random.uniform(0.95, 0.995), random.uniform(0.2, 0.9), 10 ** random.uniform(-4.5, -1.5)]
    return float(random.choice(kinds, p=[0.35, 0.15, 0.3, 0.2]))


def full_batch(seed: int, method: str = "sgd") -> Run:
    """A line on all rows at a constant rate."""
    run, random = linear(seed), np.random.default_rng([seed, 1])
    run.family, run.method = f"line, all rows, {'momentum' if method == 'momentum' else 'gradient descent'}", method
    run.details["η ÷ limit"] = ratio = _ratio(random)
    run.learning_rate = ratio * limit(run)
    return run


def momentum(seed: int) -> Run:
    """The same with momentum 0.9."""
    return full_batch(seed, "momentum")


def decaying(seed: int) -> Run:
    """A line on all rows, the rate falling to 0 along a cosine."""
    random = np.random.default_rng([seed, 1])
    run = linear(seed, float(10 ** random.uniform(0, 3)))
    run.family, run.decays = "line, all rows, decaying rate", True
    run.details["η ÷ limit"] = ratio = float(random.choice([random.uniform(0.3, 0.95), 10 ** random.uniform(-3, -1)]))
    run.learning_rate = ratio * limit(run)
    return run


def mini_batch(seed: int) -> Run:
    """A line on batches of 1 to 32 rows."""
    run, random = (
        linear(seed, float(10 ** np.random.default_rng([seed, 2]).uniform(0, 3))),
        np.random.default_rng([seed, 1]),
    )
    run.family = "line, mini-batches, SGD"
    run.batch_size = int(random.choice([1, 2, 4, 8, 16, 32]))
    run.num_steps = int(random.choice([120, 300, 500]))
    ratio = float(
        random.choice(
            [random.uniform(2, 10), random.uniform(0.1, 0.3), 10 ** random.uniform(-4.5, -2)], p=[0.3, 0.45, 0.25]
        )
    )
    run.details |= {"η ÷ limit": ratio, "batch": run.batch_size}
    run.learning_rate = ratio * limit(run)
    run.decays = bool(random.random() < 0.15)
    return run


def adam(seed: int) -> Run:
    """A line on all rows under Adam: too small, right and too large a rate for the way to go."""
    random = np.random.default_rng([seed, 1])
    run = linear(seed, float(10 ** random.uniform(0, 3)))
    run.family, run.method = "line, all rows, Adam", "adam"
    descent = Descent(run)
    distance = float(np.abs(descent.error).max())
    run.details["η · steps ÷ distance"] = reach = float(random.choice([0.01, 0.03, 3.0, 10.0, 30.0, 300.0]))
    run.learning_rate = reach * distance / run.num_steps
    return run


def small_network(seed: int) -> Run:
    """A small network, on all rows or on half of them."""
    run, random = network(seed), np.random.default_rng([seed, 1])
    run.family = "network"
    run.batch_size = int(random.choice([NUM_ROWS, NUM_ROWS, 16]))
    ratio = float(random.choice([random.uniform(5, 40), random.uniform(0.2, 0.7), 10 ** random.uniform(-4.5, -2.5)]))
    run.details |= {"η ÷ limit": ratio, "batch": run.batch_size}
    run.learning_rate = ratio * limit(run)
    return run


def mistaken(seed: int) -> Run:
    """A run with a classic mistake in it."""
    random = np.random.default_rng([seed, 1])
    mistake = str(random.choice(["accumulate", "sum", "detach", "dead", "frozen"]))
    run = network(seed) if mistake == "dead" else linear(seed, float(10 ** random.uniform(0, 2)))
    run.mistake, run.family = mistake, f"mistake: {mistake}"
    ratio = random.uniform(0.1, 0.9)
    if mistake == "dead":
        assert isinstance(run.module, nn.Sequential)
        assert isinstance(run.module[0], nn.Linear)
        nn.init.constant_(run.module[0].bias, -20.0)
        run.module[1] = nn.ReLU()
        ratio = random.uniform(0.2, 0.9)
    if mistake == "frozen":
        next(run.module.parameters()).requires_grad_(False)
        ratio = random.uniform(0.1, 0.9)
    run.details["η ÷ limit"] = ratio
    run.learning_rate = ratio * limit(run)
    return run


FAMILIES: list[Callable[[int], Run]] = [
    full_batch,
    momentum,
    mini_batch,
    adam,
    small_network,
    decaying,
    mistaken,
    full_batch,
]


def planted(num_runs: int, first_seed: int) -> Iterator[tuple[Run, Word, int]]:
    """Yields runs, what they are, and how many draws lay on a border before them.

    Args:
        num_runs: How many.
        first_seed: Seeds from there on are used; thresholds were chosen on others.
    """
    seed = first_seed
    for index in range(num_runs):
        redrawn = 0
        while True:
            run = FAMILIES[index % len(FAMILIES)](seed)
            seed += 1
            word = truth(run)
            if word:
                break
            redrawn += 1
        yield run, word, redrawn
