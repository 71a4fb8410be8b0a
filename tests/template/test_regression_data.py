import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import Tensor

from downslope.gradients.least_squares import least_squares
from downslope.runs.stored import columns
from downslope.tables.table import Table
from template.regression.data import TableData
from template.regression.model import LinearRegression
from tests.table_data import data_of

SETTINGS = {"batch_size": 8, "seed": 0}


def table(num_rows: int = 40) -> Table:
    random = np.random.default_rng(1)
    features = random.normal(5.0, 3.0, (num_rows, 3))
    return Table("random", features, features @ [1.0, -2.0, 0.5] + 7.0, ("a", "b", "c"), "y")


def test_parts_are_disjoint_and_hold_every_row() -> None:
    module = data_of(table(), **SETTINGS)
    rows = np.concatenate(list(module.rows.values()))
    assert sorted(rows) == list(range(40))
    assert [len(part) for part in module.rows.values()] == [32, 4, 4]


def test_the_split_depends_on_the_seed_alone() -> None:
    first, second, other = (data_of(table(), batch_size=size, seed=seed) for size, seed in ((8, 0), (3, 0), (8, 1)))
    assert np.array_equal(first.rows["test"], second.rows["test"])
    assert not np.array_equal(first.rows["test"], other.rows["test"])


def test_all_parts_are_in_units_of_the_training_rows() -> None:
    module = data_of(table(), **SETTINGS)
    module.setup("fit")
    train, validation = module.rows["train"], module.rows["val"]
    raw = module.table.features
    expected = (raw[validation] - raw[train].mean(axis=0)) / raw[train].std(axis=0)
    np.testing.assert_allclose(module.parts["val"][0].numpy(), expected, rtol=1e-5)
    target = module.table.target
    np.testing.assert_allclose(
        module.parts["test"][1].numpy(),
        (target[module.rows["test"]] - target[train].mean()) / target[train].std(),
        rtol=1e-4,
    )


def test_unstandardized_values_are_kept() -> None:
    module = data_of(table(), standardize=False, **SETTINGS)
    module.setup("fit")
    np.testing.assert_array_equal(
        module.parts["train"][0].numpy(), module.table.features[module.rows["train"]].astype(np.float32)
    )


def test_the_loaders_serve_their_parts() -> None:
    module = data_of(table(), **SETTINGS)
    module.setup("fit")
    loaders = {
        "train": module.train_dataloader(),
        "val": module.val_dataloader(),
        "test": module.test_dataloader(),
    }
    for part, loader in loaders.items():
        served: Tensor = torch.cat([target for _, target in loader])
        assert torch.equal(served.sort().values, module.parts[part][1].sort().values)


def test_a_constant_column_and_a_large_batch_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rows = table()
    features = rows.features.copy()
    features[:, 1] = 4.2
    module = data_of(Table("t", features, rows.target.copy(), rows.feature_names, "y"), batch_size=100, seed=0)
    with caplog.at_level(logging.WARNING):
        module.setup("fit")
        module.setup("test")
    assert caplog.messages == [
        "t: constant in the training rows, so without use: b.",
        "data.batch_size=100 is more than the 32 training rows: every batch holds them all.",
    ]
    assert torch.isfinite(module.parts["train"][0]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"batch_size": 2.5}, "`batch_size` must be"),
        ({"validation_fraction": 0.0}, "`validation_fraction` must be"),
        ({"test_fraction": 1.5}, "`test_fraction` must be"),
        ({"test_fraction": 0.9}, "must leave 2 rows to train on"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_of(table(), **{**SETTINGS, **settings}).setup("fit")


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"random must leave 2 rows to train on .* got 5 rows"):
        data_of(table(5), **SETTINGS).setup("fit")
    data_of(table(6), **SETTINGS).setup("fit")


def test_weights_count_in_the_loss_as_repeated_rows_do() -> None:
    rows = table(60)
    whole = np.random.default_rng(2).integers(1, 4, 60)
    weighted = Table("t", rows.features, rows.target, rows.feature_names, "y", weight=whole.astype(float))
    module = data_of(weighted, standardize=False, **SETTINGS)
    module.setup("fit")
    features, target, weight = module.parts["train"]
    assert weight.mean() == pytest.approx(1.0)
    repeats = whole[module.rows["train"]]
    repeated = (each.repeat_interleave(torch.from_numpy(repeats), dim=0) for each in (features, target))
    assert module.least_squares is not None
    line, expected = module.least_squares, least_squares(*repeated)
    assert line.loss == pytest.approx(expected.loss, rel=1e-9)
    torch.testing.assert_close(line.parameters, expected.parameters)
    model = LinearRegression(3, partial(torch.optim.SGD, lr=0.1), {"scheduler": None, "interval": "", "monitor": ""})
    everything = next(iter(module.parts["train"].batches(1000, None, 0, 1)))
    by_hand = ((model(features) - target).square().detach().numpy() * repeats).sum() / repeats.sum()
    assert model.loss(everything).item() == pytest.approx(by_hand, rel=1e-5)


def test_several_targets_are_predicted_under_their_names(tmp_path: Path) -> None:
    lines = [f"{i % 11},{i % 3},{2 * (i % 11)},{-(i % 3)}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,y,z", *lines]))
    data = TableData(str(tmp_path / "t.csv"), ["y", "z"], batch_size=60, seed=0)
    data.setup("fit")
    assert data.parts["train"][1].shape == (48, 2)
    assert data.least_squares is None
    optimizer = partial(torch.optim.SGD, lr=0.5)
    model = LinearRegression(2, optimizer, {"scheduler": None, "interval": "", "monitor": ""}, data.num_targets)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=50, enable_model_summary=False, **quiet)
    trainer.fit(model, datamodule=data)
    predicted = columns(trainer.predict(model, datamodule=data))
    assert list(predicted) == ["y", "z"]
    np.testing.assert_allclose(predicted["y"], [2 * (i % 11) for i in range(60)], atol=1e-3)
    np.testing.assert_allclose(predicted["z"], [-(i % 3) for i in range(60)], atol=1e-3)
