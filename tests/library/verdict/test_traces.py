"""What the graph behind a loss, the modules and a batch tell of mistakes."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from downslope.verdict.flight_record import as_numbers
from downslope.verdict.traces import broken_rows, input_size, traces_of_loss, traces_of_modules

CLASSES = torch.tensor([0, 1, 2, 0])
NUMBERS = torch.tensor([1.0, 2.0, 4.0, 9.0])


# torch 2.8 does not: what a function has kept may be a hook's, which would compute it anew, and is not looked at.
tells_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="torch does not tell what was saved by a hook"
)


def logits(num_outputs: int = 3) -> Tensor:
    torch.manual_seed(0)
    output: Tensor = nn.Linear(2, num_outputs)(torch.randn(4, 2))
    return output


@pytest.mark.parametrize(
    ("loss", "traces"),
    [
        (lambda: functional.cross_entropy(logits(), CLASSES), ("", "", False)),
        (lambda: functional.cross_entropy(logits(), CLASSES, weight=torch.ones(3)) / 4, ("", "", False)),
        (lambda: functional.cross_entropy(logits().softmax(1), CLASSES), ("softmax to what", "", False)),
        (lambda: functional.nll_loss(logits().log_softmax(1), CLASSES), ("", "", False)),
        (lambda: functional.nll_loss(logits().log_softmax(0), CLASSES), ("rows of the batch", "", False)),
        (lambda: -functional.cross_entropy(logits(), CLASSES), ("", "", True)),
        (lambda: functional.cross_entropy(logits(), CLASSES).neg().neg(), ("", "", False)),
        (
            lambda: functional.binary_cross_entropy_with_logits(logits(1)[:, 0].sigmoid(), NUMBERS / 9),
            ("sigmoid", "", False),
        ),
        (lambda: functional.binary_cross_entropy(logits(1)[:, 0].sigmoid(), NUMBERS / 9), ("", "", False)),
        pytest.param(
            lambda: functional.mse_loss(logits(1), NUMBERS), ("", "(4, 1) against (4, 4)", False), marks=tells_hooks
        ),
        (lambda: functional.mse_loss(logits(1)[:, 0], NUMBERS), ("", "", False)),
        (lambda: functional.mse_loss(logits(1).softmax(0), NUMBERS[:, None]), ("", "", False)),
        (lambda: -logits().log_softmax(1).mean(), ("", "", False)),
        (lambda: torch.tensor(1.0), ("", "", False)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")  # the mistake that is planted
def test_the_graph_behind_a_loss_shows_what_it_is_of(loss, traces: tuple[str, str, bool]) -> None:  # type: ignore[no-untyped-def]
    found = traces_of_loss(loss())
    squashed, broadcast, is_maximised = traces
    assert re.search(squashed, found.squashed)
    assert bool(found.squashed) == bool(squashed)
    assert (found.broadcast, found.is_maximised) == (broadcast, is_maximised)


@tells_hooks
def test_the_loss_of_a_constant_output_is_the_targets_entropy_or_variance() -> None:
    classes = torch.arange(3).repeat(1000)
    found = traces_of_loss(functional.cross_entropy(torch.zeros(3000, 3, requires_grad=True), classes)).level
    assert found is not None
    assert found() == pytest.approx(math.log(3), rel=1e-3)
    found = traces_of_loss(functional.mse_loss(logits(1)[:, 0], NUMBERS)).level
    assert found is not None
    assert found() == pytest.approx((9 + 4 + 0 + 25) / 3)  # around a mean of 4
    found = traces_of_loss(
        functional.binary_cross_entropy_with_logits(logits(1)[:, 0], torch.tensor([0.0, 1, 1, 1]))
    ).level
    assert found is not None
    assert found() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert traces_of_loss(2 * functional.mse_loss(logits(1)[:, 0], NUMBERS)).level is None


def test_a_loss_that_is_computed_again_in_its_backward_is_not_computed_for_a_look() -> None:
    calls = []

    def loss(output: Tensor) -> Tensor:
        calls.append(1)
        return functional.cross_entropy(output.softmax(1), CLASSES)

    found = traces_of_loss(checkpoint(loss, logits(), use_reentrant=False))
    assert "softmax" in found.squashed
    assert found.level is None
    assert len(calls) == 1


def test_layers_that_do_not_what_they_do_in_training_are_listed_unless_they_have_learned() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Dropout(0.95), nn.Dropout(0.5))
    assert traces_of_modules(net) == {"not_normalizing": (), "dropping": ("2",), "normalizes": True}
    net[0].eval()
    assert traces_of_modules(net)["not_normalizing"] == ("0",)
    net[0].num_batches_tracked += 7  # a network that was trained before
    assert traces_of_modules(net)["not_normalizing"] == ()


def test_the_size_of_a_batch_is_that_of_its_first_rows_of_numbers() -> None:
    assert input_size({"ids": CLASSES, "x": torch.full((2, 2), -3.0), "y": torch.ones(2)}) == 3.0
    assert input_size([CLASSES, NUMBERS]) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [(math.nan, "row 2 of its batch is not finite"), (1e9, "row 2 of its batch is more than 10000 × as large as most")],
)
def test_a_row_that_spoils_a_recorded_batch_is_found(value: float, words: str) -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert broken_rows(as_numbers([rows, CLASSES], 100)) == ""
    rows[2, 1] = value
    assert broken_rows(as_numbers([rows, CLASSES], 100)) == words
    assert broken_rows(as_numbers([rows * math.nan], 100)) == ""  # not one of them
