from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.optim import SGD, lr_scheduler

from downslope.callbacks import Checkpoints
from template.digits.data import DigitsData
from template.digits.model import DigitClassifier
from tests.conftest import ROOT

CONSTANT = {"scheduler": None, "interval": "epoch", "monitor": "val/loss"}
BATCHES_AN_EPOCH = 23  # 1,438 images in batches of 64


def data(seed: int = 0) -> DigitsData:
    datamodule = DigitsData(batch_size=64, seed=seed)
    datamodule.setup("fit")
    return datamodule


def classifier(lr: float = 0.5, scheduler: dict[str, Any] = CONSTANT) -> DigitClassifier:
    seed_everything(0, verbose=False)
    return DigitClassifier(64, 10, 16, partial(SGD, lr=lr), scheduler)


def trainer(epochs: int, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = ("logger", "enable_progress_bar", "enable_model_summary")
    switched_off = {**dict.fromkeys(quiet, False), "enable_checkpointing": bool(callbacks), "num_sanity_val_steps": 0}
    return Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **switched_off, **settings)


def weights(module: LightningModule) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def log_softmax(module: DigitClassifier, images: Tensor) -> np.ndarray:
    """By numpy, in float64."""
    first, second = (module.network[place] for place in (1, 3))
    hidden = images.flatten(1).double().numpy() @ first.weight.detach().double().numpy().T
    hidden = np.maximum(hidden + first.bias.detach().double().numpy(), 0.0)
    scores = hidden @ second.weight.detach().double().numpy().T + second.bias.detach().double().numpy()
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def whole(part: Any) -> tuple[Tensor, Tensor]:
    images, digits = zip(*part, strict=True)
    return torch.stack(images), torch.stack(digits)


def test_every_image_belongs_to_one_part() -> None:
    datamodule = data()
    parts = [datamodule.train, datamodule.val, datamodule.test]
    assert [len(part) for part in parts] == [1438, 180, 179]
    assert sorted(row for part in parts for row in part.indices) == list(range(1797))


def test_the_table_is_that_of_the_repository() -> None:
    images, digits = whole(data().train.dataset)
    # How often each digit occurs: UCI's own description of the test set.
    assert torch.bincount(digits).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0, 1)


def test_the_split_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = data(seed=3).val.indices
    torch.manual_seed(2)
    assert data(seed=3).val.indices == first
    assert data(seed=4).val.indices != first


def test_the_loss_is_the_mean_cross_entropy_and_asking_for_it_changes_nothing() -> None:
    module = classifier()
    images, digits = whole(data().val)
    expected = -log_softmax(module, images)[np.arange(len(digits)), digits].mean()
    before = torch.get_rng_state()
    for _ in range(2):
        assert module.loss((images, digits)).item() == pytest.approx(expected, rel=1e-6)  # float32
    assert torch.equal(torch.get_rng_state(), before)
    assert module.train_loss.update_count == module.accuracy.update_count == 0


def test_what_is_logged_are_means_over_all_images_of_a_part() -> None:
    module, datamodule = classifier(lr=1e-30), data()  # the weights stand still
    fit = trainer(1)
    fit.fit(module, datamodule)
    logged = dict(fit.callback_metrics)
    logged |= fit.test(module, datamodule, verbose=False)[0]
    assert set(logged) == {"train/loss", "val/loss", "val/accuracy", "test/loss", "test/accuracy"}
    for part in ("train", "val", "test"):
        images, digits = whole(getattr(datamodule, part))
        chances = log_softmax(module, images)
        loss = -chances[np.arange(len(digits)), digits].mean()
        assert float(logged[f"{part}/loss"]) == pytest.approx(loss, rel=1e-6)  # the last batch is a smaller one
        if part != "train":
            right = int((chances.argmax(axis=1) == digits.numpy()).sum())
            assert float(logged[f"{part}/accuracy"]) == pytest.approx(right / len(digits), rel=1e-6)


def test_a_loss_that_is_not_a_number_is_logged_as_it_is() -> None:
    module = classifier(lr=1e30)
    fit = trainer(1)
    fit.fit(module, data())
    assert torch.isnan(fit.callback_metrics["train/loss"])
    assert torch.isnan(fit.callback_metrics["val/loss"])


def test_the_experiment_reads_95_of_100_digits_that_it_was_not_trained_on() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["experiment=digits"])
    datamodule = instantiate(config.data)
    seed_everything(config.seed, verbose=False)
    sizes = {name: getattr(datamodule, name) for name in ("num_features", "num_classes")}
    module = instantiate(config.model, **sizes, _convert_="all")
    fit = trainer(config.trainer.max_epochs, deterministic=True)
    fit.fit(module, datamodule)
    assert fit.callback_metrics["val/accuracy"] >= 0.95
    assert fit.test(module, datamodule, verbose=False)[0]["test/accuracy"] >= 0.95


def test_validating_does_not_change_training() -> None:
    modules = [classifier(), classifier()]
    for module, share in zip(modules, (1.0, 0), strict=True):
        seed_everything(0, verbose=False)
        trainer(2, limit_val_batches=share).fit(module, data())
    assert torch.equal(*map(weights, modules))


class Stopped(Callback):
    """Ends the process's run in the middle of an epoch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == BATCHES_AN_EPOCH + 8:
            raise RuntimeError("killed")


def test_an_epoch_resumed_in_its_middle_ends_with_the_same_weights_and_the_same_mean_loss(tmp_path: Path) -> None:
    def fit(name: str, *others: Callback, **resume: Any) -> tuple[Tensor, Tensor]:
        module = classifier()
        run = trainer(2, Checkpoints(str(tmp_path / name), every_n_steps=5), *others)
        run.fit(module, data(), **resume)
        return weights(module), run.callback_metrics["train/loss"]

    expected = fit("whole")
    with pytest.raises(RuntimeError, match="killed"):
        fit("killed", Stopped())
    last = tmp_path / "killed" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == BATCHES_AN_EPOCH + 7  # five by five: 30
    torch.manual_seed(99)
    resumed = fit("killed", ckpt_path=last, weights_only=True)
    assert torch.equal(resumed[0], expected[0])
    assert torch.equal(resumed[1], expected[1])


def test_predictions_name_the_digit_and_how_sure_the_network_is() -> None:
    module, datamodule = classifier(), data()
    columns: Any = trainer(1).predict(module, datamodule)
    images, digits = whole(datamodule.test)
    chances = np.exp(log_softmax(module, images))
    joined = {name: torch.cat([batch[name] for batch in columns]) for name in columns[0]}
    assert list(joined) == ["digit", "prediction", "probability"]
    assert torch.equal(joined["digit"], digits)
    assert joined["prediction"].tolist() == chances.argmax(axis=1).tolist()
    assert joined["probability"].tolist() == pytest.approx(chances.max(axis=1), rel=1e-5)  # float32


@pytest.mark.parametrize(
    ("scheduler", "interval", "expected"),
    [
        (partial(lr_scheduler.StepLR, step_size=2, gamma=0.1), "epoch", 0.05),
        (partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.99**step), "step", 0.5 * 0.99 ** (2 * 23)),
        (partial(lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=0, threshold=10.0), "epoch", 0.005),
    ],
    ids=["epoch", "step", "plateau"],
)
def test_the_schedule_of_the_configuration_chooses_the_rate(
    scheduler: Callable[..., Any], interval: str, expected: float
) -> None:
    fit = trainer(2)
    fit.fit(classifier(scheduler={"scheduler": scheduler, "interval": interval, "monitor": "val/loss"}), data())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


def test_other_data_have_another_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = data()
    before = datamodule.fingerprint()
    assert data(seed=1).fingerprint() == before
    table = tmp_path / "digits.csv.gz"
    table.write_bytes(b"others")
    monkeypatch.setattr("template.digits.data.TABLE", table)
    assert datamodule.fingerprint() != before
