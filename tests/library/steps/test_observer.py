"""The life cycle that all observers share, and what happens when one fails."""

import copy
import csv
import inspect
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from downslope import callbacks
from downslope.callbacks import (
    Checkpoints,
    FlightRecorder,
    GradientCheck,
    GradientMonitor,
    LearningRateEffects,
    Pictures,
    Progress,
    SharpnessMonitor,
    VerdictMonitor,
)
from downslope.steps.observer import HOOKS, STEP_HOOKS, Observer
from downslope.steps.optimizer_steps import OptimizerStep

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
NUM_BATCHES = 4


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.05)


def rows() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    dataset = TensorDataset(torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator))
    return DataLoader(dataset, batch_size=16 // NUM_BATCHES)


def trainer_with(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    options = {"max_epochs": 2, "enable_progress_bar": any(isinstance(each, Progress) for each in callbacks)} | settings
    return Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def fit(folder: Path, module: LightningModule, *callbacks: Any, **settings: Any) -> Trainer:
    trainer = trainer_with(folder, *callbacks, **settings)
    seed_everything(0, verbose=False)
    trainer.fit(module, rows())
    return trainer


def made(kind: Callable[[], LightningModule]) -> LightningModule:
    seed_everything(0, verbose=False)
    return kind()


def ours(folder: Path) -> list[Observer]:
    return [
        GradientMonitor(1, histogram_every_n_steps=1),
        VerdictMonitor(every_n_steps=3, window=3, print_verdict=False),
        FlightRecorder(folder=str(folder)),
        LearningRateEffects(1, descent_ratio_every_n_steps=1, loss="training_step"),
        SharpnessMonitor(1, loss="training_step"),
        GradientCheck(loss="training_step"),
    ]


class Faulty(Observer):
    """Raises in one hook, or in one function of the optimizer's steps."""

    def __init__(self, where: str) -> None:
        self.where = where

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        steps = self.follow(trainer, self._before, self._after)
        steps.on_next = self.guarded(lambda: self._fail_in("on_next"))
        steps.on_loss = self.guarded(lambda _: self._fail_in("on_loss"))
        self._fail_in("attach")

    def _before(self, step: OptimizerStep) -> None:
        self._fail_in("before")

    def _after(self, step: OptimizerStep) -> None:
        self._fail_in("after")

    def _fail_in(self, where: str) -> None:
        if where == self.where:
            raise KeyError("unforeseen")


def _of_a_hook(name: str) -> Callable[..., None]:
    def hook(self: Faulty, *arguments: Any, **named: Any) -> None:
        self._fail_in(name)
        getattr(super(Faulty, self), name)(*arguments, **named)

    hook.__name__ = name
    return hook


IN_A_FIT = [
    "setup",
    "on_fit_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_end",
    "teardown",
    *STEP_HOOKS,
]
AllFaulty = type("AllFaulty", (Faulty,), {name: _of_a_hook(name) for name in IN_A_FIT})


@pytest.mark.parametrize("where", [*IN_A_FIT, "attach", "before", "after", "on_next", "on_loss"])
def test_a_failure_anywhere_is_one_warning_and_changes_no_bit(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched, alone = made(Net), made(Net)
    fit(tmp_path, watched, AllFaulty(where))
    fit(tmp_path, alone)
    assert caplog.text.count("is off from here on") == 1
    assert "AllFaulty is off from here on: KeyError: 'unforeseen'." in caplog.text
    assert all(torch.equal(*pair) for pair in zip(watched.parameters(), alone.parameters(), strict=True))


def test_what_is_no_exception_passes(tmp_path: Path) -> None:
    class Leaves(Observer):
        def on_train_batch_end(self, *_: Any) -> None:
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        fit(tmp_path, Net(), Leaves())


def test_what_is_deliberate_passes(tmp_path: Path) -> None:
    class Means(Observer):
        deliberate = (KeyError,)

        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("meant")

    with pytest.raises(KeyError, match="meant"):
        fit(tmp_path, Net(), Means())


def test_one_that_failed_watches_the_next_fit(tmp_path: Path) -> None:
    observer = AllFaulty("on_train_batch_end")
    trainer = fit(tmp_path, Net(), observer)
    assert observer.is_off
    observer.where = "nowhere"
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Net(), rows())
    assert not observer.is_off


def test_hooks_that_come_without_a_training_do_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, module = trainer_with(tmp_path), Net()
    for observer in ours(tmp_path):
        observer.on_train_batch_start(trainer, module, None, 0)
        observer.on_before_backward(trainer, module, torch.zeros(()))
        observer.on_after_backward(trainer, module)
        observer.on_before_optimizer_step(trainer, module, SGD(module.parameters(), lr=0.1))
        observer.on_train_batch_end(trainer, module, None, None, 0)
        observer.on_train_end(trainer, module)
        observer.teardown(trainer, module, "fit")
    assert "is off" not in caplog.text


def test_hooks_that_do_nothing_are_passed_over_in_a_run_and_back_after_it(tmp_path: Path) -> None:
    class Ends(Observer):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.asleep = [name for name in STEP_HOOKS if not callable(getattr(self, name))]
            asleep.append(self.asleep)

    asleep: list[list[str]] = []
    observer = Ends()
    fit(tmp_path, Net(), observer)
    assert asleep[0] == [name for name in STEP_HOOKS if name != "on_train_batch_end"]
    assert all(callable(getattr(observer, name)) for name in HOOKS)
    assert not hasattr(observer, "asleep")  # first assigned in the run, and gone with it


@pytest.mark.parametrize("copied", [lambda each: pickle.loads(pickle.dumps(each)), copy.deepcopy])
def test_a_fitted_trainer_can_be_pickled_and_copied(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    trainer = fit(tmp_path, Net(), *ours(tmp_path), Progress())
    assert [type(each) for each in copied(trainer).callbacks] == [type(each) for each in trainer.callbacks]


def test_a_trainer_fits_twice_and_the_verdict_survives_a_test(tmp_path: Path) -> None:
    class Tested(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    observers = ours(tmp_path)
    trainer = fit(tmp_path, Tested(), *observers)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(Tested(), rows())
    monitor = observers[1]
    assert isinstance(monitor, VerdictMonitor)
    verdict = monitor.verdict
    assert verdict
    assert verdict.figures["step"] == 4 * NUM_BATCHES
    trainer.test(Tested(), rows(), verbose=False)
    assert monitor.verdict is verdict


WITH_A_FREQUENCY = [
    each
    for each in map(vars(callbacks).get, callbacks.__all__)
    if issubclass(each, Callback) and "every_n_steps" in inspect.signature(each).parameters
]


@pytest.mark.parametrize("value", [1.5, True, 0, "3", -1])
@pytest.mark.parametrize("kind", WITH_A_FREQUENCY)
def test_every_observer_refuses_a_frequency_that_is_none(kind: Any, value: Any, tmp_path: Path) -> None:
    folder = {"folder": str(tmp_path)} if kind in (Pictures, Checkpoints) else {}
    with pytest.raises(ValueError, match="`every_n_steps` must be a whole number of at least 1, got"):
        kind(**folder, every_n_steps=value)


def test_all_that_measure_every_so_often_were_asked() -> None:
    assert {each.__name__ for each in WITH_A_FREQUENCY} == {
        "Checkpoints", "CriticalLearningRate", "FlightRecorder", "GradientMonitor", "LearningRateEffects", "Pictures",
        "SharpnessMonitor", "VerdictMonitor",
    }  # fmt: skip


# What modules do that ours do not.


class TwoHeads(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) if batch_idx % 2 else self.other(batch[0]).square().mean()


class Outside(Net):
    """Its optimizer holds a tensor that is no parameter of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = [torch.ones(3, requires_grad=True)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0] * self.scale[0], batch[1]], batch_idx)

    def configure_optimizers(self) -> Any:
        return SGD([*self.parameters(), *self.scale], lr=0.05)


class Grows(Net):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.extra = nn.Linear(3, 3)
            self.optimizers().add_param_group({"params": list(self.extra.parameters())})  # type: ignore[union-attr]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        features = self.extra(batch[0]) if hasattr(self, "extra") else batch[0]
        return super().training_step([features, batch[1]], batch_idx)


class WithoutOptimizer(Net):
    def configure_optimizers(self) -> None:
        return None


class Rateless(SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.05)
        for group in self.param_groups:
            group["lr"] = None

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each -= 0.05 * each.grad
        return loss


class WithoutRate(Net):
    def configure_optimizers(self) -> Optimizer:
        return Rateless(self.parameters())


class Deeper(SGD):
    """Its step calls that of SGD, so that torch runs the hooks of a step twice."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        super().step()
        return loss


class WithDeeper(Net):
    def configure_optimizers(self) -> Optimizer:
        SGD(self.parameters(), lr=0.1)  # torch hooks a class where one of it is made
        return Deeper(self.parameters(), lr=0.05)


class Sharp(SGD):
    """SAM: the gradient of a second closure, a little uphill, is the one that counts."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        held = [each for group in self.param_groups for each in group["params"]]
        moves = [0.01 * each.grad.clone() for each in held]
        for each, move in zip(held, moves, strict=True):
            each += move
        with torch.enable_grad():
            closure()
        for each, move in zip(held, moves, strict=True):
            each -= move
        super().step()
        return loss


class WithSharp(Net):
    def configure_optimizers(self) -> Optimizer:
        return Sharp(self.parameters(), lr=0.05)


class LossOfShapeOne(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).reshape(1)


class ChangesItsBatch(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        batch[0].mul_(0.5)
        return super().training_step([batch[0], batch.pop()], batch_idx)


class Complex(Net):
    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j, 0.5j]))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0] * self.wave.abs(), batch[1]], batch_idx)


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0] + self.table((batch[0][:, 0] > 0).long()), batch[1]], batch_idx)


class Half(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net.bfloat16()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([each.bfloat16() for each in batch], batch_idx)


def by_hand(kind: type[Net]) -> type[Net]:
    """The same module with manual optimization."""

    class Manual(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss: Tensor = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
            return loss

    Manual.__name__ = f"Manual{kind.__name__}"
    return Manual


FOREIGN = [
    *map(by_hand, (TwoHeads, Outside, Grows, Complex, WithDeeper)),
    TwoHeads,
    Outside,
    Grows,
    WithoutOptimizer,
    WithoutRate,
    WithDeeper,
    WithSharp,
    LossOfShapeOne,
    ChangesItsBatch,
    Complex,
    Sparse,
    Half,
]


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
def test_foreign_modules_train_to_the_same_bits_and_are_seen(
    kind: type[Net], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched, alone = made(kind), made(kind)
    recorder = FlightRecorder(folder=str(tmp_path))
    monitor = GradientMonitor(1, histogram_every_n_steps=1)
    seen = Gradients()
    effects = LearningRateEffects(1, descent_ratio_every_n_steps=None)
    fit(tmp_path, watched, monitor, effects, VerdictMonitor(3, 3, print_verdict=False), recorder, seen)
    fit(tmp_path, alone)
    assert all(torch.equal(*pair) for pair in zip(watched.parameters(), alone.parameters(), strict=True))
    assert not recorder.diverged
    off = "VerdictMonitor is off from here on: Rateless has no learning rate to judge." if kind is WithoutRate else ""
    messages = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert [
        each for each in messages if each.startswith(("VerdictMonitor", "FlightRec", "Grad", "Learning", "Cannot"))
    ] == ([off] if off else [])
    if kind is WithoutOptimizer:
        return
    totals = written(tmp_path, "gradient_norm/total")
    assert totals == pytest.approx(dict(enumerate(seen.norms)), rel=2e-5)
    assert len(recorder.state_dict()["steps"]) == 2 * NUM_BATCHES


def written(folder: Path, tag: str) -> dict[int, float]:
    """What the first fit in a folder logged, by step."""
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[tag]) for row in csv.DictReader(file) if row.get(tag)}


class Gradients(Observer):
    """An independent recorder: the norm of all that the optimizer holds, in float64, after each batch."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        held = [each for group in trainer.optimizers[0].param_groups for each in group["params"]]
        squares = [
            float(
                (torch.view_as_real(each.grad) if each.grad.is_complex() else each.grad.to_dense())
                .double()
                .square()
                .sum()
            )
            for each in held
            if each.grad is not None
        ]
        self.norms.append(sum(squares) ** 0.5)
