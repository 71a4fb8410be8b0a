import math

import torch
from frozen import differences

BEFORE = {"last.ckpt: weight": torch.tensor([1.0, math.nan]), ".: train/loss": torch.tensor([[6.0, 0.5]])}


def copy() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in BEFORE.items()}


def test_equal_bits_are_no_difference() -> None:
    assert differences(BEFORE, copy()) == []  # what is not a number in both included


def test_a_bit_that_differs_and_what_one_side_alone_has_are_found() -> None:
    after = copy()
    after["last.ckpt: weight"][0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    after["new"] = after.pop(".: train/loss")
    assert differences(BEFORE, after) == [
        "only before: .: train/loss",
        "only after: new",
        "another value: last.ckpt: weight",
    ]


def test_a_number_in_place_of_none_is_found() -> None:
    after = copy()
    after["last.ckpt: weight"][1] = 2.0
    assert differences(BEFORE, after) == ["another value: last.ckpt: weight"]
