"""What the critical learning rate decides: `too_large`, `too_slow`, and which rate to try next."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR

from downslope.gradients import critical_learning_rate, least_squares
from downslope.gradients.outlook import Outlook
from downslope.verdict import Evidence, EvidenceCollector, Verdict, judge, suggest
from downslope.verdict.hints import learns_nothing
from downslope.verdict.method import first_length

SOUND = Evidence(
    step=100,
    learning_rate=0.1,
    method="adam",
    full_batch=False,
    first_loss=2.0,
    loss=0.8,
    best_loss=0.8,
    loss_trend=-9.0,
    gradient_norm=0.5,
    first_gradient_norm=1.0,
    gradient_decay=0.99,
    noise_share=0.8,
    left_to_gain=0.5,
    update_ratio=1e-2,
    critical_learning_rate=0.6,
    first_critical_learning_rate=0.6,
    least_critical_learning_rate=0.6,
    early_critical_ratio=0.2,
)
LINE = Outlook(excess=0.4, condition_number=2.0, direction="s1", share=1.0, decay=0.9, num_steps=50)
THROWN = replace(SOUND, early_growth=30.0, early_critical_ratio=4.0, first_critical_learning_rate=0.03)


def test_a_rate_far_below_the_critical_one_is_too_slow_whatever_the_optimizer_and_a_sixth_is_suggested() -> None:
    for method in ("gradient_descent", "momentum", "adam", "other"):
        verdict = judge(replace(SOUND, method=method, learning_rate=1e-3))  # type: ignore[arg-type]
        assert verdict.word == "too_slow"
        assert verdict.suggestion.learning_rate == pytest.approx(0.1)
        assert "Try lr=0.1." in verdict.sentence


def test_what_is_advised_from_too_large_is_not_called_too_slow_where_the_valley_widens_on_the_way() -> None:
    advised = suggest(THROWN, "too_large").learning_rate
    assert advised
    after = replace(SOUND, learning_rate=advised, critical_learning_rate=0.5, least_critical_learning_rate=0.03)
    assert advised / 0.5 < 0.015
    assert judge(after).word == "converging"


def test_the_advice_from_too_slow_lies_between_what_was_measured_last_and_the_least() -> None:
    slow = replace(SOUND, learning_rate=1e-3, critical_learning_rate=5.4, least_critical_learning_rate=0.6)
    assert suggest(slow, "too_slow").learning_rate == pytest.approx(0.3)  # √(5.4 · 0.6) / 6


@pytest.mark.parametrize("first", [0.3, 3.0])
def test_what_was_thrown_is_told_a_rate_well_below_its_own_also_where_it_began_in_a_flat_place(first: float) -> None:
    rate = suggest(replace(THROWN, learning_rate=0.3, first_critical_learning_rate=first), "too_large").learning_rate
    assert rate == pytest.approx(0.06)


def test_of_what_is_not_finite_without_a_rate_to_blame_no_rate_is_said() -> None:
    spoilt = replace(SOUND, num_non_finite=1, first_critical_learning_rate=3.0)
    assert suggest(spoilt, "non_finite").learning_rate is None
    assert suggest(replace(spoilt, learning_rate=0.7), "non_finite").learning_rate == pytest.approx(0.14)


def test_a_batch_that_is_far_steeper_than_all_rows_are_counts_where_a_line_diverges() -> None:
    line = replace(THROWN, learning_rate=0.02, method="gradient_descent", sharpness=4.0, line=LINE)
    assert suggest(line, "diverging").learning_rate == pytest.approx(0.02 / 5)  # not 1/(2λ), which is no smaller
    assert suggest(replace(line, learning_rate=2.0), "diverging").learning_rate == pytest.approx(1 / 8)


def test_a_line_that_has_next_to_nothing_to_learn_is_told_to_decay_all_the_same() -> None:
    flat = replace(SOUND, step=400, loss=1.0, constant_loss=1.0, line=replace(LINE, excess=0.01), full_batch=False)
    assert suggest(flat, "oscillating").decay
    assert not suggest(replace(flat, line=None), "oscillating").decay
    assert learns_nothing(flat)
    assert not learns_nothing(replace(flat, line=LINE))  # it knows of a lower loss


def test_what_was_thrown_to_where_it_learns_nothing_is_told_a_rate_all_the_same() -> None:
    nothing = replace(THROWN, loss=1.9, constant_loss=1.9, step=240)
    assert suggest(nothing, "too_large").learning_rate == pytest.approx(0.006)
    assert suggest(nothing, "too_slow").learning_rate is None


def test_it_is_the_peak_of_a_schedule_that_is_held_against_the_critical_rate() -> None:
    assert judge(replace(SOUND, learning_rate=1e-5, peak_learning_rate=0.1)).word == "converging"
    assert judge(replace(SOUND, learning_rate=1e-5, peak_learning_rate=1e-3)).word == "too_slow"


def test_a_sound_run_gets_no_advice() -> None:
    verdict = judge(SOUND)
    assert verdict.word == "converging"
    assert verdict.suggestion.learning_rate is None
    assert "Try" not in verdict.sentence


def test_a_run_that_was_thrown_stays_too_large_wherever_it_went_and_gets_a_fifth_of_the_first_critical_rate() -> None:
    for later in ({}, {"gradient_norm": 0.0}, {"loss": 0.11}, {"critical_learning_rate": 1e6, "loss_trend": 0.0}):
        verdict = judge(replace(THROWN, **later))  # type: ignore[arg-type]
        assert verdict.word == "too_large"
        assert verdict.suggestion.learning_rate == pytest.approx(0.006)
        assert "30 × where it began, at 4 × the critical learning rate" in verdict.sentence


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"early_growth": 1.9}, "converging"),  # uphill at first, but it came down
        ({"early_growth": 1.9, "loss": 1.9}, "too_large"),  # … and did not
        ({"early_critical_ratio": 0.5}, "converging"),  # a jump that no rate explains, and it came down
        ({"loss": 0.09}, "converging"),  # it was not thrown away: nineteen twentieths are gone
        ({"early_critical_ratio": None, "loss": 1.9}, "too_large"),
        ({"early_critical_ratio": 0.4, "loss": 1.9, "sharpness": 1e-6}, "too_large"),  # flat where it was thrown to
        ({"early_growth": 1.0, "early_peak": 3.0, "step": 16, "loss": 1.9}, "too_large"),
        ({"early_growth": 1.0, "early_peak": 3.0, "step": 16, "loss": 0.9}, "converging"),
        ({"early_growth": 1.0, "early_peak": 1.5, "step": 16, "loss": 1.9}, "converging"),
        ({"early_critical_ratio": None, "loss": 1.9, "sharpness": 1.0, "method": "momentum"}, "converging"),
    ],
)
def test_what_counts_as_thrown(change: dict[str, object], word: str) -> None:
    assert judge(replace(THROWN, **change)).word == word  # type: ignore[arg-type]


def test_units_that_a_large_step_killed_are_too_large_and_not_just_stalled() -> None:
    killed = replace(SOUND, share_moving=0.1, first_share_moving=1.0, loss_trend=0.0, early_critical_ratio=0.5)
    assert judge(killed).word == "too_large"
    assert judge(replace(killed, first_share_moving=0.1)).word == "stalled"
    assert judge(replace(killed, early_critical_ratio=0.01)).word == "stalled"
    assert judge(replace(killed, loss=0.0, share_moving=0.0, gradient_norm=0.0, left_to_gain=0.0)).word == "converged"


def test_while_it_diverges_that_is_said_and_the_cause_at_the_end() -> None:
    grows = {"loss": 300.0, "gradient_ratio": 2.0, "window_growth": 9.0, "gradient_norm": 9.0}
    during = replace(THROWN, **grows)  # type: ignore[arg-type]
    assert judge(during).word == "diverging"
    assert judge(replace(during, has_ended=True)).word == "too_large"
    innocent = replace(during, has_ended=True, early_growth=1.0, early_critical_ratio=0.1)
    assert judge(innocent).word == "diverging"
    assert judge(replace(during, has_ended=True, num_non_finite=1)).word == "non_finite"


@pytest.mark.parametrize(("peak", "word"), [(0.1, "converging"), (1e-7, "too_slow")])
def test_a_line_whose_schedule_has_come_to_its_end_is_held_against_its_peak(peak: float, word: str) -> None:
    line = replace(LINE, excess=1e-3, num_steps=4_000_000)
    ended = replace(SOUND, method="gradient_descent", learning_rate=1e-7, peak_learning_rate=peak, sharpness=5.0)
    assert judge(replace(ended, line=line, first_excess=0.8, left_to_gain=1e-3)).word == word


@pytest.mark.parametrize(("size", "word"), [(1e-9, "diverging"), (1e-14, "converging")])
def test_what_rounding_has_left_of_a_loss_does_not_grow(size: float, word: str) -> None:
    grows = {"loss_growth": 9.0, "loss_rise": 9.0, "method": "gradient_descent"}
    assert judge(replace(SOUND, loss=9 * size, best_loss=size, **grows)).word == word  # type: ignore[arg-type]  # of figures


@pytest.mark.parametrize("peak", [0.1, 0.0999])
def test_a_rate_that_is_in_use_is_never_suggested(peak: float) -> None:
    slow = replace(SOUND, learning_rate=1e-3)
    assert suggest(slow, "too_slow").learning_rate == pytest.approx(0.1)
    assert suggest(replace(slow, peak_learning_rate=peak), "too_slow").learning_rate is None


def test_no_suggestion_goes_the_wrong_way() -> None:
    unknown = {"critical_learning_rate": None, "first_critical_learning_rate": None}
    contradictory = replace(SOUND, **unknown, method="gradient_descent", largest_curvature=1e-6)  # type: ignore[arg-type]
    assert suggest(contradictory, "too_large").learning_rate is None  # flat where it was thrown to
    assert suggest(replace(contradictory, largest_curvature=1e6), "too_slow").learning_rate is None
    assert suggest(replace(SOUND, method="lbfgs"), "too_slow").learning_rate is None


def test_where_noise_holds_the_weights_no_rate_is_suggested_but_a_decaying_one() -> None:
    held = replace(SOUND, critical_learning_rate=None, loss_trend=0.0, gradient_decay=1.0, left_to_gain=0.1)
    verdict = judge(held)
    assert verdict.word == "oscillating"
    assert verdict.suggestion.learning_rate is None
    assert verdict.override == "scheduler=cosine"
    assert verdict.sentence.endswith(
        "A decaying rate or a larger batch would let it fall further. Try scheduler=cosine."
    )
    decaying = judge(replace(held, peak_learning_rate=1.0))
    assert decaying.override == ""
    assert decaying.sentence.endswith("A larger batch would let it fall further.")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, "converging"),
        ({"left_to_gain": 0.2}, "oscillating"),  # of 1.9 that were gained
        ({"left_to_gain": 0.02, "best_loss": 0.05}, "converging"),
        ({"best_loss": 0.05, "loss": 0.3}, "oscillating"),
        ({"loss_trend": -9.0, "gradient_cosine": -0.9, "critical_learning_rate": 0.11}, "converging"),
        ({"loss": 1.5, "best_loss": 1.5, "left_to_gain": 0.2, "early_critical_ratio": 0.8}, "too_large"),
    ],
)
def test_a_rate_that_is_sound_by_the_critical_one_is_not_blamed_for_a_little_noise(
    change: dict[str, object], word: str
) -> None:
    held = replace(
        SOUND, first_loss=2.0, loss=0.1, best_loss=0.1, loss_trend=0.0, gradient_decay=1.0, left_to_gain=0.02
    )
    assert judge(replace(held, **change)).word == word  # type: ignore[arg-type]


def test_a_schedule_that_has_come_to_its_end_is_not_described_by_its_last_rate() -> None:
    ended = judge(replace(SOUND, learning_rate=0.0, peak_learning_rate=0.1, sharpness=4.0))
    assert ended.word == "converging"
    assert ended.sentence.startswith("converging: the rate has decayed to almost nothing")
    assert "largest stable" not in ended.sentence


# --- collected in a loop ---


def train(make: type[Optimizer], learning_rate: float, num_steps: int = 64, decays: bool = False) -> Verdict:
    """A small network on mini-batches; the critical rate is measured at steps 0 and 8, as a callback does."""
    torch.manual_seed(2)
    features = torch.randn(256, 4)
    target = torch.tanh(features).sum(1)
    module = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 1), nn.Flatten(0))
    parameters = list(module.parameters())
    optimizer = make(parameters, lr=learning_rate)  # type: ignore[call-arg]
    schedule = CosineAnnealingLR(optimizer, num_steps) if decays else None
    collector = EvidenceCollector(optimizer, {}, last_step=num_steps)
    for step in range(num_steps):
        rows = torch.randint(0, 256, (64,))
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(features[rows]), target[rows])
        loss.backward()
        optimizer.step()
        collector.add_step()
        collector.add_loss(loss)
        if step in (0, 8):
            after = [parameter.detach().clone() for parameter in parameters]
            rate = optimizer.param_groups[0]["lr"]

            @torch.no_grad()
            def along(eta: float, b=before, a=after, r=rate, rows=rows) -> float:
                for parameter, start, end in zip(parameters, b, a, strict=True):
                    parameter.copy_(start + (end - start) * eta / r)
                return float(nn.functional.mse_loss(module(features[rows]), target[rows]))

            with contextlib.suppress(ValueError):  # momentum's and Adam's step need not go downhill
                collector.add_critical(step, critical_learning_rate(along, rate))
            along(rate)
        if schedule:
            schedule.step()
    return judge(collector.evidence())


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_following_the_advice_from_far_too_slow_comes_to_rest_in_one_step(make: type[Optimizer]) -> None:
    slow = train(make, 1e-5)
    assert slow.word == "too_slow"
    assert slow.suggestion.learning_rate
    followed = train(make, slow.suggestion.learning_rate)
    assert followed.word == "converging"
    assert followed.suggestion.learning_rate is None


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_a_rate_that_is_far_too_large_is_said_and_the_advice_is_sound(make: type[Optimizer]) -> None:
    large = train(make, {SGD: 1.0}.get(make, 3.0))
    assert large.word in ("too_large", "non_finite")
    assert large.suggestion.learning_rate
    assert train(make, large.suggestion.learning_rate).word == "converging"


def test_a_cosine_schedule_that_ends_at_nothing_is_sound() -> None:
    assert train(Adam, 0.03, decays=True).word == "converging"


def test_a_resumed_collector_remembers_the_critical_rates() -> None:
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    one, other = EvidenceCollector(optimizer, {}), EvidenceCollector(optimizer, {})
    one.add_critical(0, 0.25)
    one.add_critical(8, 4.0)
    other.load_state_dict(one.state_dict())
    seen = other.evidence()
    assert seen.critical_learning_rate == 4.0
    assert seen.least_critical_learning_rate == 0.25
    assert seen.early_critical_ratio == 2.0


def test_the_short_first_step_of_momentum_is_not_taken_for_a_steady_one() -> None:
    collector = EvidenceCollector(SGD(nn.Linear(1, 1).parameters(), lr=0.5, momentum=0.9), {})
    collector.add_critical(0, 2.0)
    assert collector.evidence().critical_learning_rate == pytest.approx(0.2)
    collector.add_critical(200, 2.0)
    assert collector.evidence().critical_learning_rate == pytest.approx(2.0)


def test_the_long_first_steps_of_rmsprop_are_not_taken_for_steady_ones() -> None:
    module = nn.Linear(1, 1)
    optimizer = RMSprop(module.parameters(), lr=0.01)
    lengths = []
    for _ in range(9):
        module.weight.grad, module.bias.grad = torch.ones(1, 1), torch.ones(1)
        before = float(module.bias.detach())
        optimizer.step()
        lengths.append((before - float(module.bias.detach())) / 0.01)
    assert lengths[0] == pytest.approx(10, rel=1e-4)
    for step in (0, 8):
        assert first_length(optimizer, step) == pytest.approx(lengths[step], rel=1e-4)


def test_lbfgs_is_known_by_name() -> None:
    assert EvidenceCollector(LBFGS(nn.Linear(1, 1).parameters()), {}).evidence().method == "lbfgs"


# --- lines ---


def line_run(
    features: torch.Tensor, target: torch.Tensor, rate: float, num_steps: int, decay: float = 0.0, batch: int = 10**6
) -> tuple[Evidence, float]:
    torch.manual_seed(0)
    module = nn.Linear(features.shape[1], 1)
    optimizer = SGD(module.parameters(), lr=rate, weight_decay=decay)
    full = batch >= len(target)
    collector = EvidenceCollector(optimizer, {}, full_batch=full, last_step=num_steps)
    line = least_squares(features, target)
    collector.set_line(line.decayed(decay) if decay else line, list(module.parameters()), 1e-3)
    for step in range(num_steps):
        rows = torch.arange(step * batch, step * batch + batch) % len(target) if not full else torch.arange(len(target))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(features[rows]).squeeze(-1), target[rows])
        loss.backward()
        optimizer.step()
        collector.add_step()
        collector.add_loss(loss)
        if collector.is_due:
            evidence = collector.evidence()
    with torch.no_grad():
        final = float(nn.functional.mse_loss(module(features).squeeze(-1), target))
    return evidence, final


def correlated(num_rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that share nearly all they have, and a target that asks for the rest."""
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(num_rows, 1, generator=generator)
    features = common + 0.05 * torch.randn(num_rows, 5, generator=generator)
    target = features @ torch.tensor([3.0, -3.0, 2.0, -2.0, 1.0]) + 0.5 * torch.randn(num_rows, generator=generator)
    return features, target


def test_slow_directions_of_correlated_features_are_not_taken_for_noise() -> None:
    features, target = correlated()
    evidence, _ = line_run(features, target, rate=0.01, num_steps=500, batch=32)
    assert evidence.noise_share > 0.5
    assert evidence.line
    assert evidence.line.young_share > 0.9
    assert judge(evidence).word in ("converging", "too_slow")


def test_weight_decay_is_judged_against_the_optimum_that_it_has() -> None:
    features, target = correlated(60)
    evidence, _ = line_run(features, target, rate=0.02, num_steps=600, decay=0.5)
    verdict = judge(evidence)
    assert verdict.word == "converged"
    assert verdict.hints == ()


def test_at_rest_under_weight_decay_the_gradient_is_that_of_the_objective() -> None:
    evidence, _ = line_run(*correlated(60), rate=0.02, num_steps=600, decay=0.5)
    assert evidence.gradient_norm is not None
    assert evidence.first_gradient_norm is not None
    assert evidence.gradient_norm < 1e-3 * evidence.first_gradient_norm


def test_following_the_advice_on_a_line_ends_no_higher_and_is_not_complained_of() -> None:
    features, target = correlated(40)
    evidence, before = line_run(features, target, rate=0.01, num_steps=50)
    rate = judge(evidence).suggestion.learning_rate
    assert rate
    followed, after = line_run(features, target, rate=rate, num_steps=50)
    verdict = judge(followed)
    assert after <= before
    assert verdict.suggestion.learning_rate is None
    assert "Try" not in verdict.sentence
    assert verdict.word != "oscillating"


@pytest.mark.parametrize("factor", [5.0, 0.06, 1.0])
def test_a_gradient_of_another_length_is_measured_exactly_on_a_line(factor: float) -> None:
    features, target = correlated(40)
    module = nn.Linear(5, 1)
    optimizer = SGD(module.parameters(), lr=1e-3)
    collector = EvidenceCollector(optimizer, {}, full_batch=True, last_step=8)
    collector.set_line(least_squares(features, target), list(module.parameters()), 1e-3)
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(features).squeeze(-1), target)
        (factor * loss).backward()
        optimizer.step()
        collector.add_step()
        collector.add_loss(loss / 100)  # as it is logged matters no more
    evidence = collector.evidence()
    assert evidence.gradient_excess == pytest.approx(factor, rel=1e-3)
    assert bool(judge(evidence).hints) == (factor > 1.8)


def test_nothing_early_is_said_of_losses_that_can_be_negative() -> None:
    collector = EvidenceCollector(SGD(nn.Linear(1, 1).parameters(), lr=0.1), {})
    for value in (-1.0, 5.0, math.pi):
        collector.add_loss(torch.tensor(value))
    assert collector.evidence().early_growth is None
