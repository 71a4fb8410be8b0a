"""The valley along a direction, against closed forms."""

import math

import pytest

from downslope.gradients.line_search import look_for_best


@pytest.mark.parametrize("start", [1e-4, 0.7, 1.0, 900.0])
def test_the_valley_of_a_parabola_is_found_from_either_side(start: float) -> None:
    assert look_for_best(lambda rate: 5 - 2 * rate + rate**2 / 3, start).best == pytest.approx(3.0, rel=1e-6)


def test_the_valley_of_another_curve_is_found_nearly() -> None:
    # d/dη (e^η − 3η) = 0 at ln 3
    assert look_for_best(lambda rate: math.exp(rate) - 3 * rate, 0.1).best == pytest.approx(math.log(3), rel=1e-2)


def test_what_is_not_finite_is_high() -> None:
    def loss(rate: float) -> float:
        return math.nan if rate > 2 else (rate - 1) ** 2

    assert look_for_best(loss, 1000.0).best == pytest.approx(1.0)


@pytest.mark.parametrize("loss", [lambda _: 1.0, lambda rate: rate, lambda _: math.nan])
def test_a_loss_that_falls_nowhere_has_no_best(loss: object) -> None:
    with pytest.raises(ValueError, match="it is flat to within rounding"):
        look_for_best(loss, 1.0)  # type: ignore[arg-type]
