"""A short form of `make peers`: other people's modules are watched, and the watching is watched."""

import re
import subprocess
import sys
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "laboratory"))

import peers
from foreign import observing
from foreign.supervised import Regressor

SEED = 13
HARD = ("SelfDistillation", "AlternatingHeads", "HoldsOutsideTensors", "Manual")


@pytest.fixture
def _beartype_may_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    random_states = observing._random_states
    beartype = {"random state: Python": "drawn from by beartype, in tests alone"}
    monkeypatch.setattr(observing, "_random_states", lambda: random_states() | beartype)


@pytest.mark.usefixtures("_beartype_may_draw")
def test_observing_changes_nothing_of_modules_whose_step_leaves_something_behind() -> None:
    count = peers.Count()
    for module in HARD:
        peers.judge(peers.Case(module, "SGD-momentum", "clip-norm" if module != "Manual" else "plain"), count)
    assert (count.tried, count.skipped.total(), count.failures) == (len(HARD), 0, [])


@pytest.mark.slow
def test_observing_changes_nothing_with_any_module_optimizer_or_option() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "laboratory" / "peers.py"), "--quick", "--seed", str(SEED)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"^tried \d\d+, skipped \d+ .*, failures 0$", ended.stdout, flags=re.MULTILINE)


def test_the_matrix_is_as_large_as_it_says_and_holds_every_pair() -> None:
    cases = peers.pairs(SEED)
    names = [peers.MODULES, peers.OPTIMIZERS, peers.OPTIONS]
    assert all(len(each) >= least for each, least in zip(names, (60, 25, 20), strict=True))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        columns = [("module", "optimizer", "option")[place] for place in (one, other)]
        met = {tuple(getattr(case, column) for column in columns) for case in cases}
        assert met == set(product(names[one], names[other]))


def changed(watch: type[Callback], monkeypatch: pytest.MonkeyPatch, kind: type[Any] = Regressor) -> list[str]:
    """What is found where another callback stands for the observers."""
    monkeypatch.setattr(observing, "observers", lambda *_, **__: [watch()])
    plain, observed = (observing.fit(kind, "SGD", "plain", each) for each in (False, True))
    return observing.differences(plain, observed, kind)


def test_a_weight_that_moves_by_its_last_bit_is_found(monkeypatch) -> None:
    class Moves(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            weight = pl_module.net[0].weight.data
            weight.copy_(torch.nextafter(weight, torch.tensor(torch.inf)))

    assert changed(Moves, monkeypatch) == ["weight or buffer: net.0.weight"]


def test_a_random_number_that_is_drawn_is_found(monkeypatch) -> None:
    class Draws(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            torch.rand(1)

    assert changed(Draws, monkeypatch) == ["random state: torch"]


def test_a_second_call_of_a_training_step_is_found(monkeypatch) -> None:
    class Calls(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                pl_module.training_step(batch, batch_idx)

    found = changed(Calls, monkeypatch)
    assert found == [f"{name} was called 24 times instead of 12" for name in ("forward", "training_step")]


def test_a_norm_that_is_wrong_missing_or_after_clipping_is_found() -> None:
    observed = observing.Outcome()
    observed.expected["gradient_norm/total"] = {0: 5.0, 1: 2.0, 2: 1.0}
    observed.curves["gradient_norm/total"] = {0: 5.0001, 2: 1.000001, 7: 1.0}
    assert observing.wrong_figures(observed) == [
        "gradient_norm/total is missing at step 1",
        "gradient_norm/total at step 7 is of no step",
        "gradient_norm/total at step 0 is 5.0001, should be 5.0",
    ]


@pytest.mark.usefixtures("_beartype_may_draw")
@pytest.mark.parametrize("part", ["applied", "update_ratio/total", "effective", "gradient_cosine", "learning_rate/SGD"])
def test_any_figure_that_is_a_thousandth_off_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, planted = observing.Curves.log_metrics, []

    def log_metrics(self: Any, metrics: Any, step: int | None = None) -> None:
        wrong = {tag: value * 1.001 if part in tag and step == 3 else value for tag, value in metrics.items()}
        planted.extend(wrong.keys() - dict(set(metrics.items()) & set(wrong.items())))
        real(self, wrong, step)

    plain = observing.fit(Regressor, "SGD", "clip-norm", observed=False)
    assert observing.differences(plain, observing.fit(Regressor, "SGD", "clip-norm", observed=True), Regressor) == []
    monkeypatch.setattr(observing.Curves, "log_metrics", log_metrics)
    found = observing.differences(plain, observing.fit(Regressor, "SGD", "clip-norm", observed=True), Regressor)
    assert len(planted) == 1
    assert [each.partition(" is ")[0] for each in found] == [f"{planted[0]} at step 3"]


def test_the_recorder_takes_the_norm_before_clipping_in_both_modes() -> None:
    """One linear layer, one batch: ∂/∂w of the mean of w·x is the mean of x, of whatever w."""

    class Line(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1, bias=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.full((8, 4), 3.0)).mean()

    class ByHand(Line):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            optimizer.step()

    for kind, option in ((Line, "clip-norm"), (ByHand, "plain")):
        norms = observing.fit(kind, "SGD", option, observed=False).expected["gradient_norm/total"]
        assert norms == dict.fromkeys(range(12), pytest.approx(6.0))


def test_an_internal_error_in_what_an_observer_says_is_found_and_a_reason_is_not() -> None:
    observed = observing.Outcome(said=["GradientMonitor is off: KeyError: 'a'", "Pictures are off: no loss(batch)"])
    assert observing.differences(observing.Outcome(), observed, Regressor) == [
        "said: GradientMonitor is off: KeyError: 'a'"
    ]


def test_leave_to_call_the_loss_again_is_leave_for_no_other_module() -> None:
    calls = Counter({"forward": 2, "loss": 2})
    for name, allowed in (("LossOfBatch", True), ("LossOfPredictions", False), ("Regressor", False)):
        found = observing.differences(observing.Outcome(), observing.Outcome(calls=calls), peers.MODULES[name])
        assert (found == []) is allowed, name
