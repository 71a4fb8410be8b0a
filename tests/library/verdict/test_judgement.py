import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from downslope.gradients.least_squares import least_squares
from downslope.gradients.outlook import best_learning_rate, outlook
from downslope.verdict import WORDS, Evidence, EvidenceCollector, Thresholds, Verdict, judge, num_steps_left, suggest

SOUND = Evidence(
    step=100,
    learning_rate=0.1,
    first_loss=2.0,
    loss=1.0,
    best_loss=1.0,
    loss_trend=-9.0,
    gradient_norm=0.5,
    first_gradient_norm=1.0,
    gradient_ratio=0.99,
    gradient_decay=0.99,
    gradient_cosine=0.999,
    left_to_gain=0.5,
    update_ratio=1e-2,
    sharpness=8.0,
)
BOUNCING = replace(SOUND, gradient_cosine=-0.99, learning_rate=0.249)
GROWING = replace(BOUNCING, learning_rate=0.26, loss=9.0, gradient_ratio=1.06, gradient_decay=1.06, window_growth=2.2)
NOISY = {"noise_share": 0.95, "loss_trend": 0.3, "gradient_decay": 1.0, "left_to_gain": 0.1, "full_batch": False}
HAND_MADE = {
    "converging": SOUND,
    "converged": replace(SOUND, left_to_gain=1e-4),
    "too_slow": replace(SOUND, learning_rate=1e-4, gradient_decay=0.9999),
    "too_large": replace(SOUND, early_growth=30.0, early_critical_ratio=4.0),
    "oscillating": BOUNCING,
    "diverging": replace(
        BOUNCING, learning_rate=0.26, loss=9.0, gradient_ratio=1.06, gradient_decay=1.06, window_growth=2.2
    ),
    "stalled": replace(SOUND, gradient_norm=0.0, gradient_cosine=None, share_moving=0.0),
    "non_finite": replace(SOUND, num_non_finite=1),
}


@pytest.mark.parametrize("word", WORDS)
def test_each_word_has_its_evidence(word: str) -> None:
    verdict = judge(HAND_MADE[word])
    assert verdict.word == word
    assert verdict.sentence.startswith(f"{word}: ")
    assert verdict.figures["step"] == 100


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (NOISY, "oscillating"),
        ({"loss": 5.0, "loss_growth": 9.0, "loss_rise": 5.0, "noise_share": 0.9, "full_batch": False}, "diverging"),
        ({"loss": 5.0, "loss_growth": 9.0, "loss_rise": 0.0, "noise_share": 0.9, "full_batch": False}, "converging"),
        ({"loss": 1.9, "loss_growth": 9.0, "loss_rise": 9.0}, "converging"),  # a wobble, no factor of two
        ({"loss": 300.0, "window_growth": 50.0, "gradient_ratio": 7.0}, "diverging"),
        ({"left_to_gain": math.inf}, "converging"),
        ({"update_ratio": 0.0}, "stalled"),
        ({"share_moving": 0.1, "loss_trend": 0.0}, "stalled"),
        ({"share_moving": 0.1}, "converging"),  # the others still have something to do
        ({"leftover_gradient": True}, "oscillating"),
        ({"method": "adam", "gradient_decay": 0.99999, "learning_rate": 1e-6}, "too_slow"),
        ({"learning_rate": 0.2, "gradient_decay": 0.99999}, "converging"),  # slow, but not for its rate
        ({"gradient_norm": 1e-9, "left_to_gain": 0.0}, "converged"),
        ({"gradient_norm": None, "share_moving": 0.0}, "stalled"),
    ],
)
def test_what_else_leads_to_a_word(change: dict[str, object], word: str) -> None:
    assert judge(replace(SOUND, **change)).word == word  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"without_gradient": ("a.weight",)}, "no gradient reaches `a.weight`"),
        ({"zero_gradient": ("a", "b", "c", "d")}, "the gradient of `a`, `b`, `c` and 1 more is exactly zero"),
        ({"forgotten": ("head.weight",)}, "no optimizer holds `head.weight`"),
        ({"leftover_gradient": True}, "zero_grad() missing"),
        ({"gradient_excess": 6.0}, "about 6 × that of the loss"),
        ({"squashed": "one too many?"}, "one too many?"),
        ({"broadcast": "(4, 1) against (4,)"}, "compares (4, 1) against (4,), each row with every other"),
        ({"is_maximised": True}, "a sign wrong"),
        ({"constant_loss": 1.01, "update_ratio": 0.1}, "the targets belong to these inputs"),
        ({"input_size": 127.0, "num_non_finite": 1}, "the inputs are of size 1.3e+02"),
        ({"clipped_norm": 1e-3, "learning_rate": 1e-5, "critical_learning_rate": 1.0}, "has the norm 0.001"),
        ({"decay_share": 0.98}, "weight decay is 98% of the first steps"),
        ({"steps_at_zero": 60}, "at its end for 60 of 100 steps"),
        ({"share_changed": 0.3}, "a step changes 30% of the weights"),
        ({"not_normalizing": ("norm",)}, "`norm` is in eval mode"),
        ({"dropping": ("net.3",)}, "`net.3` leaves at most a tenth"),
        ({"broken_rows": "row 3 of its batch is not finite"}, "row 3 of its batch is not finite"),
    ],
)
def test_a_mistake_is_named_by_its_traces(change: dict[str, object], hint: str) -> None:
    assert judge(SOUND).hints == ()
    (said,) = judge(replace(SOUND, **change)).hints  # type: ignore[arg-type]
    assert hint in said


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": 127.0},  # but it trains
        {"input_size": 127.0, "num_non_finite": 1, "normalizes": True},
        {"clipped_norm": 1e-3},
        {"constant_loss": 1.01, "update_ratio": 1e-4},  # it has not gone far enough to tell
        {"constant_loss": 1.2, "update_ratio": 0.1},
        {"decay_share": 0.1, "steps_at_zero": 3, "share_changed": 0.9},
    ],
)
def test_no_mistake_is_named_by_half_of_its_traces(change: dict[str, object]) -> None:
    assert judge(replace(SOUND, **change)).hints == ()  # type: ignore[arg-type]


def test_what_is_frozen_on_purpose_is_a_fact_and_no_accusation() -> None:
    verdict = judge(replace(SOUND, frozen=("a", "b", "c", "d"), loss_trend=0.0))
    assert verdict.word == "converging"
    assert verdict.hints == ()
    assert "Frozen: `a`, `b`, `c` and 1 more." in verdict.sentence


@pytest.mark.parametrize(
    ("change", "rate"),
    [
        ({}, 1 / 8),
        ({"full_batch": False}, 1 / 16),
        ({"full_batch": False, "method": "momentum", "momentum": 0.9}, None),
        ({"method": "lbfgs"}, None),
        ({"method": "momentum", "momentum": 0.81}, (1 + 0.9) ** 2 / 8),
        ({"method": "nesterov", "momentum": 0.81}, 1 / 8),
        ({"method": "adam"}, None),
        ({"method": "other"}, None),
        ({"sharpness": None}, None),
        ({"sharpness": None, "largest_curvature": 4.0}, 1 / 4),
        ({"leftover_gradient": True}, None),
        ({"gradient_excess": 5.0}, 1 / 40),
    ],
)
def test_the_suggestion_follows_the_theory(change: dict[str, object], rate: float | None) -> None:
    evidence = replace(SOUND, **change)  # type: ignore[arg-type]
    suggestion = suggest(evidence, "oscillating")
    assert suggestion.learning_rate == (rate if rate is None else pytest.approx(rate))
    assert suggestion.reason


def spectral_radius(rate: float, beta: float, curvature: float, nesterov: bool) -> float:
    """Of two steps' matrix along one direction, θₜ₊₁ in terms of θₜ and θₜ₋₁."""
    keep = 1 - rate * curvature
    trace, last = ((1 + beta) * keep, -beta * keep) if nesterov else (keep + beta, -beta)
    return float(torch.linalg.eigvals(torch.tensor([[trace, last], [1.0, 0.0]], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("method", ["momentum", "nesterov"])
def test_the_limit_is_where_the_spectral_radius_passes_one(method: str, beta: float) -> None:
    limit = Evidence(1, 0.1, method=method, momentum=beta, sharpness=8.0).limit  # type: ignore[arg-type]
    assert limit is not None
    assert spectral_radius(0.999 * limit, beta, 8.0, method == "nesterov") < 1
    assert spectral_radius(1.001 * limit, beta, 8.0, method == "nesterov") > 1


def test_nonsense_thresholds_are_refused() -> None:
    for wrong in ({"tolerance": 0.0}, {"growth": 1.0}, {"bouncing": 0.5}, {"noisy": math.nan}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must"):
            Thresholds(**wrong)


# --- the closed form --------------------------------------------------------------------------------------------------


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(60, 3, generator=generator) * torch.tensor([3.0, 1.0, 0.2])
    return features, features @ torch.tensor([1.0, -2.0, 0.5]) + torch.randn(60, generator=generator)


def test_the_steps_still_needed_are_those_that_gradient_descent_takes() -> None:
    features, target = problem()
    line = least_squares(features, target)
    inputs = torch.nn.functional.pad(features.double(), (0, 1), value=1.0)
    theta, rate, steps = torch.zeros(4, dtype=torch.float64), 0.05, 0
    first = float((inputs @ theta - target).square().mean()) - line.loss
    seen = outlook(line, theta, rate, 1e-3 * first, ("a", "b", "c"))
    assert seen.excess == pytest.approx(first)
    while float((inputs @ theta - target).square().mean()) - line.loss > 1e-3 * first:
        theta -= rate * 2 / len(target) * inputs.T @ (inputs @ theta - target.double())
        steps += 1
    assert seen.num_steps == steps > 30
    assert seen.direction == "c"  # the feature of least spread
    assert outlook(line, theta, 1.01 * line.largest_stable_learning_rate, 0.0).num_steps is None


def test_no_rate_of_a_fine_grid_needs_fewer_than_three_quarters_of_the_steps_of_the_suggested() -> None:
    line = least_squares(*problem())
    start = torch.zeros(4)
    target = 1e-3 * outlook(line, start, 0.0, 0.0).excess
    rate = best_learning_rate(line, start, target)
    assert rate <= 0.75 * line.largest_stable_learning_rate  # never to the edge
    needed = outlook(line, start, rate, target).num_steps
    grid = [line.largest_stable_learning_rate * index / 1000 for index in range(1, 1000)]
    steps = [outlook(line, start, rate, target).num_steps for rate in grid]
    assert needed is not None
    assert 0.75 * needed <= 1.02 * min(each for each in steps if each is not None)


# --- what is collected ------------------------------------------------------------------------------------------------


def collect(rate: float, num_steps: int, kind: type[SGD] | type[Adam] = SGD) -> Evidence:
    """Gradient descent on all rows; the evidence of the last judgement."""
    features, target = problem()
    torch.manual_seed(1)
    module = nn.Linear(3, 1)
    optimizer = kind(module.parameters(), lr=rate)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    collector = EvidenceCollector(optimizer, names, full_batch=True, last_step=num_steps)
    evidence = None
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(features).squeeze(-1), target)
        loss.backward()
        optimizer.step()
        collector.add_step()
        collector.add_loss(loss)
        if collector.is_due:
            evidence = collector.evidence()
    assert evidence
    return evidence


def test_above_the_limit_the_window_shows_what_theory_says() -> None:
    line = least_squares(*problem())
    seen = collect(1.1 * line.largest_stable_learning_rate, 100)
    assert seen.gradient_cosine == pytest.approx(-1, abs=1e-3)
    assert seen.gradient_ratio == pytest.approx(1.2, rel=1e-3)  # |1 − ηλ|
    assert seen.curvature == pytest.approx(line.sharpness, rel=1e-3)
    assert judge(replace(seen, has_ended=False)).word == "diverging"
    assert judge(seen).word == "too_large"  # by the rate: the last word says the cause


def test_below_it_the_flattest_direction_sets_the_pace() -> None:
    line = least_squares(*problem())
    seen = collect(0.2 * line.largest_stable_learning_rate, 250)
    decay = 1 - seen.learning_rate * float(line.eigenvalues[0])
    assert seen.gradient_ratio == pytest.approx(decay, rel=1e-3)
    assert seen.gradient_decay == pytest.approx(decay, rel=1e-2)
    assert seen.gradient_cosine == pytest.approx(1, abs=1e-3)
    assert seen.gradient_excess == pytest.approx(1, abs=0.05)
    steps = num_steps_left(seen)
    assert steps is None or math.isfinite(steps)


def test_adam_has_no_suggestion_and_no_limit() -> None:
    seen = collect(0.01, 100, Adam)
    assert seen.method == "adam"
    assert seen.limit is None
    assert "no suggestion" in judge(seen).suggestion.reason


def test_a_collector_goes_on_where_another_stopped() -> None:
    module = nn.Linear(3, 1)
    optimizer = SGD(module.parameters(), lr=0.1)
    one, other = (EvidenceCollector(optimizer, {}, full_batch=True) for _ in range(2))
    for _ in range(8):
        module(torch.ones(2, 3)).square().mean().backward()
        one.add_step()
        one.add_loss(torch.tensor(2.0))
    one.evidence()
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()


def test_a_gradient_that_ends_at_zero_beside_frozen_weights_has_arrived() -> None:
    arrived = replace(SOUND, gradient_norm=0.0, left_to_gain=0.0, zero_gradient=("bias",), share_moving=0.0)
    assert judge(arrived).word == "stalled"
    verdict = judge(replace(arrived, frozen=("weight",)))
    assert verdict.word == "converged"
    assert verdict.hints == ()


def lora_of(width: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """A frozen layer with a thin one beside it, and the optimizer's parameters: all of them, as many scripts do it."""
    torch.manual_seed(3)
    module = nn.ModuleDict({"base": nn.Linear(width, 1).requires_grad_(False), "thin": nn.Linear(1, 1)})
    return module, list(module.parameters())


def test_a_small_trained_part_beside_a_frozen_one_is_not_stalled() -> None:
    module, parameters = lora_of(40)
    optimizer = SGD(parameters, lr=0.1)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    collector = EvidenceCollector(optimizer, {id(p): n for n, p in module.named_parameters()}, full_batch=True)
    inputs = torch.linspace(-1, 1, 40)
    for _ in range(100):
        optimizer.zero_grad()
        thin = module["thin"](inputs[:, None]).squeeze(-1)
        loss = (module["base"](inputs) + thin - 2 * inputs).square().mean()
        collector.add_backward()
        loss.backward()
        optimizer.step()
        collector.add_step()
        collector.add_loss(loss)
    verdict = judge(collector.evidence(frozen))
    assert verdict.word in ("converging", "converged")
    assert verdict.hints == ()
    assert "Frozen: `base.weight`, `base.bias`." in verdict.sentence


def collect_leftovers(clear_first: bool) -> Evidence:
    """Two losses a step, of which the first one is another optimizer's: as in a GAN."""
    module = nn.Linear(2, 1)
    optimizer = SGD(module.parameters(), lr=0.1)
    collector = EvidenceCollector(optimizer, {}, full_batch=True)
    for _ in range(8):
        collector.add_backward()  # the other network's backward finds this one's gradient
        if clear_first:
            optimizer.zero_grad()
        collector.add_backward()
        loss = module(torch.ones(4, 2)).square().mean()
        loss.backward()
        optimizer.step()
        collector.add_step()
        collector.add_loss(loss)
    return collector.evidence()


def test_only_a_gradient_that_no_backward_finds_gone_is_left_over() -> None:
    assert not collect_leftovers(clear_first=True).leftover_gradient
    assert collect_leftovers(clear_first=False).leftover_gradient


def heads_in_turn(unused: bool) -> Verdict:
    """Each batch trains another head, and one none at all where that is asked for."""
    torch.manual_seed(3)
    heads = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    optimizer = SGD(heads.parameters(), lr=0.01)
    collector = EvidenceCollector(optimizer, {id(p): n for n, p in heads.named_parameters()})
    for step in range(32):
        optimizer.zero_grad()
        loss = heads[step % (2 if unused else 3)](torch.ones(4, 1)).square().mean()
        collector.add_backward(loss)
        loss.backward()
        optimizer.step()
        collector.add_step()
        collector.add_loss(loss)
    return judge(collector.evidence())


def test_a_head_that_is_trained_by_other_batches_is_not_said_to_be_detached() -> None:
    verdict = heads_in_turn(unused=False)
    assert verdict.word in ("converging", "too_slow")
    assert verdict.hints == ()


def test_a_head_that_no_batch_trains_is() -> None:
    assert heads_in_turn(unused=True).hints == (
        "no gradient reaches `2.weight`, `2.bias`: detached, or not used by the loss?",
    )
