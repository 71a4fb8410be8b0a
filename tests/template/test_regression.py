from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from downslope.tables.synthetic import synthetic_table
from template.regression.data import TableData
from template.regression.manual import ManualLinearRegression
from template.regression.model import LinearRegression
from template.schedules import cosine, warmup_cosine
from tests.table_data import data_of

EPOCHS = 6
CONSTANT = {"scheduler": None, "interval": "epoch", "monitor": "val/loss"}
OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.02, momentum=0.9),
    "adam": partial(Adam, lr=0.1),
    "adamw": partial(AdamW, lr=0.1, weight_decay=0.1),
}
SCHEDULERS = {
    "cosine": cosine,
    "step": partial(lr_scheduler.StepLR, step_size=2, gamma=0.1),
    "warmup_cosine": partial(warmup_cosine, warmup=0.3),
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=0, threshold=10.0),
}


def datamodule(**settings: Any) -> TableData:
    return data_of(synthetic_table(60, 3, 0.1, 4.0, seed=5), batch_size=7, seed=0, **settings)


def fit(
    kind: type[LinearRegression],
    optimizer: Callable[..., torch.optim.Optimizer],
    scheduler: dict[str, Any] = CONSTANT,
    epochs: int = EPOCHS,
    **settings: Any,
) -> tuple[LinearRegression, Trainer]:
    by_hand = settings if kind is ManualLinearRegression else {}
    seed_everything(0, verbose=False)
    module = kind(3, optimizer, scheduler, **by_hand)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({} if by_hand else settings),
    )
    trainer.fit(module, datamodule=datamodule())
    return module, trainer


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_automatic_and_manual_reach_the_same_bits(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    automatic, _ = fit(LinearRegression, optimizer)
    manual, _ = fit(ManualLinearRegression, optimizer)
    assert torch.equal(weights(automatic), weights(manual))


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_automatic_and_manual_agree_under_a_schedule(name: str, interval: str) -> None:
    if name == "plateau" and interval == "step":
        pytest.skip("a plateau of the validation loss is seen once an epoch")
    scheduler = {"scheduler": SCHEDULERS[name], "interval": interval, "monitor": "val/loss"}
    automatic, first = fit(LinearRegression, OPTIMIZERS["sgd"], scheduler)
    manual, second = fit(ManualLinearRegression, OPTIMIZERS["sgd"], scheduler)
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in (first, second)]
    assert rates[0] == rates[1] != 0.1
    assert torch.equal(weights(automatic), weights(manual))


def test_automatic_and_manual_clip_alike() -> None:
    automatic, _ = fit(LinearRegression, OPTIMIZERS["sgd"], gradient_clip_val=0.1)
    manual, _ = fit(ManualLinearRegression, OPTIMIZERS["sgd"], gradient_clip_val=0.1)
    unclipped, _ = fit(LinearRegression, OPTIMIZERS["sgd"])
    assert torch.equal(weights(automatic), weights(manual))
    assert not torch.equal(weights(automatic), weights(unclipped))


def test_a_step_is_the_parameters_minus_learning_rate_times_gradient() -> None:
    module, _ = fit(ManualLinearRegression, OPTIMIZERS["sgd"], epochs=1)
    seed_everything(0, verbose=False)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in nn.Linear(3, 1).parameters()]
    data = datamodule()
    data.setup("fit")
    for features, target in data.train_dataloader():
        loss = nn.functional.mse_loss(nn.functional.linear(features, *parameters).squeeze(-1), target)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=-0.1)
    assert torch.equal(weights(module), torch.cat([parameter.detach().flatten() for parameter in parameters]))


def test_training_reaches_least_squares() -> None:
    decay = {**CONSTANT, "scheduler": partial(lr_scheduler.StepLR, step_size=50, gamma=0.1)}
    module, _ = fit(LinearRegression, partial(SGD, lr=0.3), decay, epochs=200)
    data = datamodule()
    data.setup("fit")
    features, target = data.parts["train"]
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    solution = torch.linalg.lstsq(inputs, target.double()).solution
    torch.testing.assert_close(weights(module).double(), solution, atol=1e-3, rtol=0)  # the last batches' noise


def test_the_logged_loss_is_the_mean_over_the_epochs_rows() -> None:
    module, trainer = fit(LinearRegression, partial(SGD, lr=1e-30), epochs=1)  # the weights stand still
    data = datamodule()
    data.setup("fit")
    features, target = data.parts["train"]
    expected = (module(features) - target).square().mean()
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], expected.detach())


def test_validation_does_not_change_training() -> None:
    with_validation, _ = fit(LinearRegression, OPTIMIZERS["sgd"])
    seed_everything(0, verbose=False)
    module = LinearRegression(3, OPTIMIZERS["sgd"], CONSTANT)
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=datamodule())
    assert torch.equal(weights(module), weights(with_validation))


def test_manual_refuses_an_optimizer_that_needs_a_closure() -> None:
    with pytest.raises(ValueError, match=r"Cannot train `model=manual` with `optimizer=lbfgs`\. This is because"):
        ManualLinearRegression(3, partial(torch.optim.LBFGS, lr=1.0), CONSTANT)


def test_warmup_cosine_rises_to_the_rate_and_falls_to_zero() -> None:
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = warmup_cosine(optimizer, num_steps=6, warmup=1 / 3)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # A hundredth, half-way, the rate; then (1 + cos(π k/4)) / 2.
    assert rates == pytest.approx([0.01, 0.505, 1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)


@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize("has_weight", [False, True])
def test_the_loss_of_many_lines_at_once_is_that_of_each(num_targets: int, has_weight: bool) -> None:
    torch.manual_seed(0)
    lines = [LinearRegression(4, optimizer=torch.optim.SGD, scheduler={}, num_targets=num_targets) for _ in range(3)]
    target, weight = (torch.rand(7) if num_targets == 1 else torch.rand(7, num_targets)), torch.rand(7)
    weight = weight if num_targets == 1 else weight[:, None]
    batch = (torch.rand(7, 4), target, *([weight] if has_weight else []))
    stacked = {name: torch.stack([line.state_dict()[name] for line in lines]) for name in lines[0].state_dict()}
    together = lines[0].stacked_loss(stacked, batch)
    torch.testing.assert_close(together, torch.stack([line.loss(batch) for line in lines]))
