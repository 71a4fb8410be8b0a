"""The loss of a batch once more: the right number, with leave alone, and without a trace."""
# ruff: noqa: NPY002 — the process-wide generator is one of those that must stay

import functools
import inspect
import random
from collections import Counter, deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from downslope.callbacks import (
    FlightRecorder,
    GradientCheck,
    GradientMonitor,
    LearningRateEffects,
    Pictures,
    SharpnessMonitor,
    VerdictMonitor,
)
from downslope.steps.loss import BatchLoss, copied, has_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`dataloader_iter`"),
    pytest.mark.filterwarnings("ignore:.*trying to `self.log"),
]

SEED = torch.Generator().manual_seed(0)
INPUTS, TARGETS = torch.randn(24, 3, generator=SEED), torch.randn(24, 1, generator=SEED)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are tiny: threads would spend the time waiting for each other
    yield
    torch.set_num_threads(before)


class Foreign(LightningModule):
    """Somebody else's module: no `loss(batch)`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.05)


class Momentum(Foreign):
    """A teacher that follows, as in MoCo, BYOL and DINO."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(3, 1).requires_grad_(False)
        self.student = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(0.9).add_(new, alpha=0.1)
        distance = (self.student(batch[0]) - self.teacher(batch[0]) - batch[1]).square().mean()
        return distance + super().training_step(batch, batch_idx)


class Pops(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.network(batch.pop(0)), batch.pop(0))


class Physics(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = batch[0].requires_grad_()
        (slope,) = torch.autograd.grad(self.network(inputs).sum(), inputs, create_graph=True)
        return (slope - 1).square().mean()


class FromTheIterator(Foreign):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class OwnGenerator(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=self.generator)
        return super().training_step([batch[0] + noise, batch[1]], batch_idx)


class Counts(Foreign):
    num_steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.num_steps += 1
        return super().training_step(batch, batch_idx) * min(1.0, self.num_steps / 10)


class Collects(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        return loss + sum(self.outputs) / 10


class Criterion(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.MSELoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])


class OfPredictions(Foreign):
    def loss(self, predictions: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(predictions, target)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])


FOREIGN = [
    Foreign, Momentum, Pops, Physics, FromTheIterator, OwnGenerator, Counts, Collects, Criterion, OfPredictions,
]  # fmt: skip


class Own(Foreign):
    """Gives leave, and draws from every generator that there is.

    Not from Python's own in a fit: beartype, which holds the shapes in these tests, draws from that.
    """

    draw: Any = staticmethod(lambda: 0.0)

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(3), random.Random(3), np.random.default_rng(3)
        self.torchs, self.pythons, self.numpys = self.own
        self.mean = MeanMetric()

    def loss(self, batch: Any) -> Tensor:
        noise = self.draw() + np.random.rand() + float(torch.rand(())) + self.pythons.random()
        noise += self.numpys.random() + float(torch.rand((), generator=self.torchs))
        inputs = batch.pop(0).mul_(1.01)
        loss = nn.functional.mse_loss(self.network(inputs) + 0.1 * noise, batch[0])
        self.mean.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"twice": 2 * loss}, on_epoch=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


def counted(kind: type[Foreign]) -> type[Foreign]:
    """The same class, whose own methods count their calls by name; a forward of its parts counts as `forward`."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        method = getattr(kind, name)

        @functools.wraps(method)  # its signature tells Lightning what to pass
        def count(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return method(*arguments, **named)

        return count

    def initialise(self: Any) -> None:
        kind.__init__(self)
        self.network.register_forward_hook(lambda *_: calls.update(["forward"]))

    names = [
        "training_step",
        "configure_optimizers",
        *[name for name in ["loss"] if inspect.isfunction(vars(kind).get(name))],
    ]
    members = {name: counting(name) for name in names}
    return type("Counted", (kind,), {"__init__": initialise, "calls": calls, **members})


def observers(folder: Path) -> list[Callback]:
    return [
        GradientCheck(on_disagreement="warn"),
        GradientMonitor(1, histogram_every_n_steps=1),
        LearningRateEffects(1, descent_ratio_every_n_steps=1),
        SharpnessMonitor(1),
        Pictures(str(folder), every_n_steps=4),
        FlightRecorder(),
        VerdictMonitor(),
    ]


def fit(folder: Path, module: LightningModule, callbacks: list[Callback], **settings: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(TensorDataset(INPUTS, TARGETS), 6))
    return trainer


def ending(folder: Path, kind: type[Foreign], watched: bool) -> dict[str, Any]:
    """All that a fit leaves behind."""
    seed_everything(0, verbose=False)
    module = kind()
    trainer = fit(folder, module, observers(folder) if watched else [])
    return {
        **module.state_dict(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "metrics": {name: value for name, value in trainer.callback_metrics.items() if "loss" in name},
        "random": (np.random.get_state()[1].tolist(), torch.get_rng_state()),
        "own": [
            value.get_state() if isinstance(value, torch.Generator) else value.random()
            for value in getattr(module, "own", ())
        ],
        "calls": getattr(module, "calls", None),
        "steps": trainer.global_step,
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", FOREIGN)
def test_under_all_observers_a_foreign_module_is_called_as_often_and_ends_with_the_same_bits(
    tmp_path: Path, kind: type[Foreign], caplog: pytest.LogCaptureFixture
) -> None:
    watched = ending(tmp_path / "watched", counted(kind), watched=True)
    said = [each.message for each in caplog.records if each.levelname == "WARNING" and "loss(batch)" in each.message]
    alone = ending(tmp_path / "alone", counted(kind), watched=False)
    assert [key for key in alone if not same(watched[key], alone[key])] == []
    assert watched["calls"]["training_step"] > 0
    assert len(said) == 1, said  # for all: the check, descent ratio, critical rate, sharpness and picture
    assert all("has no method `loss(batch)`: add one, or give the callback `loss=`" in each for each in said)


def test_the_comparison_above_sees_a_second_call(tmp_path: Path) -> None:
    class Calls(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 2:
                with torch.no_grad():
                    pl_module.training_step(batch, batch_idx)

    seed_everything(0, verbose=False)
    module = counted(Momentum)()
    fit(tmp_path / "again", module, [Calls()])
    alone = ending(tmp_path / "alone", counted(Momentum), watched=False)
    assert module.calls != alone["calls"]
    assert not torch.equal(module.teacher.weight, alone["teacher.weight"])


def test_a_module_that_gives_leave_ends_with_the_same_bits_and_the_same_means(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = ending(tmp_path / "watched", Own, watched=True)
    assert not [each.message for each in caplog.records if " off" in each.message or "left out" in each.message]
    alone = ending(tmp_path / "alone", Own, watched=False)
    assert [key for key in alone if not same(watched[key], alone[key])] == []
    assert {"loss_epoch", "loss_step"} <= watched["metrics"].keys()
    header = (tmp_path / "watched" / "metrics.csv").read_text().splitlines()[0]
    assert {"learning_rate_effect/descent_ratio", "curvature/sharpness"} <= set(header.split(","))
    assert list((tmp_path / "watched").glob("step_along_gradient_*.png"))


class Leaves(Foreign):
    """Its loss has a consequence; which one, each test plants."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls, self.losses, self.memory, self.recent = 0, [], {"sum": torch.zeros(2)}, deque([1.0])
        self.running = torch.zeros(2)
        self.part = nn.Linear(1, 1)

    def plant(self) -> None:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        self.plant()
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])


def consequence(name: str, plant: Any) -> Any:
    return pytest.param(name, plant, id=f"{name}: {plant.__code__.co_names[-1]}")


CONSEQUENCES = [
    consequence("num_calls", lambda self: setattr(self, "num_calls", self.num_calls + 1)),
    consequence("losses", lambda self: self.losses.append(1.0)),
    consequence("memory", lambda self: self.memory.update(new=1)),
    consequence("memory", lambda self: self.memory["sum"].add_(1.0)),
    consequence("running", lambda self: self.running.mul_(0.5).add_(1.0)),
    consequence("recent", lambda self: self.recent.appendleft(2.0)),
    consequence("unheard", lambda self: setattr(self, "unheard", 1)),
    consequence("losses", lambda self: delattr(self, "losses")),
    consequence("part.seen", lambda self: setattr(self.part, "seen", 1)),
    consequence("part.training", lambda self: self.part.eval()),
    consequence("_modules", lambda self: self.add_module("more", nn.Linear(1, 1))),
    consequence("_parameters", lambda self: self.register_parameter("more", nn.Parameter(torch.ones(1)))),
]


@pytest.mark.parametrize(("name", "plant"), CONSEQUENCES)
def test_an_attribute_that_the_loss_changes_is_put_back_and_named(name: str, plant: Any) -> None:
    module = type("Planted", (Leaves,), {"plant": plant})()
    before = {key: copied(value) for key, value in vars(module).items() if key in vars(Leaves()) and key[0] != "_"}
    members = dict(module.named_parameters()), dict(module.named_modules())
    loss = BatchLoss(module, (INPUTS, TARGETS))
    with pytest.raises(ValueError, match=rf"`loss` of Planted must change nothing but buffers, and changes .*`{name}`"):
        loss(loss.leaves(loss.parameters))
    assert all(same(getattr(module, key), value) for key, value in before.items() if key != "recent")
    assert module.recent == deque([1.0])
    assert not hasattr(module, "unheard")
    assert not hasattr(module.part, "seen")
    assert module.part.training
    after = dict(module.named_parameters()), dict(module.named_modules())
    assert all(one.keys() == other.keys() for one, other in zip(members, after, strict=True))
    assert all(after[0][key] is parameter for key, parameter in members[0].items())


def test_a_loss_with_consequences_turns_the_measurements_off_once_and_training_keeps_its_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Anneals(Foreign):
        num_calls = 0

        def loss(self, batch: Any) -> Tensor:
            self.num_calls += 1
            return nn.functional.mse_loss(self.network(batch[0]), batch[1]) * min(1.0, self.num_calls / 5)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    watched = ending(tmp_path / "watched", Anneals, watched=True)
    said = [each.message for each in caplog.records if "num_calls" in each.message]
    alone = ending(tmp_path / "alone", Anneals, watched=False)
    assert [key for key in alone if not same(watched[key], alone[key])] == []
    assert len(said) == 3  # the descent ratio, the sharpness and the picture: the check sees two different numbers


def test_the_number_is_that_of_the_forward_and_dropout_drops_the_same() -> None:
    torch.manual_seed(1)
    module = Own()
    module.draw = random.random
    loss = BatchLoss(module, [INPUTS.clone(), TARGETS])
    training = module.loss([INPUTS.clone(), TARGETS])
    place = loss.leaves(loss.parameters)  # beartype, in the tests, draws from Python's random numbers
    states = (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state(),
        str(module.numpys.bit_generator.state),
    )
    for _ in range(2):
        assert torch.equal(loss(place), training)
    after = (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state(),
        str(module.numpys.bit_generator.state),
    )
    assert same(states, after)


def test_along_a_direction_the_loss_is_that_of_moved_parameters() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batch = INPUTS.double(), TARGETS.double()
    mean_square = lambda module, batch: nn.functional.mse_loss(module(batch[0]), batch[1])  # noqa: E731
    loss = BatchLoss(module, batch, mean_square)
    start = loss.parameters
    direction = {name: torch.randn_like(tensor) for name, tensor in start.items() if "bias" in name}
    for length in (0.0, -0.5, 3.0):
        moved = {name: tensor + length * direction.get(name, 0.0) for name, tensor in start.items()}
        expected = nn.functional.mse_loss(functional_call(module, moved, (batch[0],)), batch[1])
        assert float(loss.along(start, direction)(length)) == pytest.approx(float(expected), rel=1e-14)


def test_torch_func_derives_it_forward_and_backward_as_autograd_does() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batch = INPUTS.double(), TARGETS.double()
    loss = BatchLoss(module, batch, lambda module, batch: nn.functional.mse_loss(module(batch[0]), batch[1]))
    place = loss.parameters
    nn.functional.mse_loss(module(batch[0]), batch[1]).backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    with loss.measuring():
        found = grad(loss)(place)
        _, slope = jvp(loss, (place,), (expected,))
        second = grad(lambda place: sum((g * g).sum() for g in grad(loss)(place).values()))(place)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert float(slope) == pytest.approx(sum(float(g.square().sum()) for g in expected.values()))
    step = 1e-5  # ∇‖g‖² = 2Hg: a central difference of the gradient along itself
    around = []
    for sign in (1, -1):
        moved = {name: tensor + sign * step * expected[name] for name, tensor in place.items()}
        around.append(loss.value_and_gradient(moved)[1])
    for name in expected:
        torch.testing.assert_close(second[name], (around[0][name] - around[1][name]) / step, rtol=1e-6, atol=1e-9)


def test_parts_under_two_names_and_tied_parameters_keep_their_tensors() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.again = nn.Linear(2, 2)
            self.other = nn.Linear(2, 2)
            self.other.weight = self.first.weight

    module = Shared()
    tensors = [module.first.weight, module.again.bias, module.other.weight, module.other.bias]
    loss = BatchLoss(module, torch.eye(2), lambda module, rows: module.other(module.again(rows)).sum())
    place = {name: torch.ones_like(tensor) for name, tensor in loss.parameters.items()}
    assert float(loss(place)) == 2 * 2 * (2 * (1 + 1) + 1)  # each entry: a row of twos times a column of ones, plus one
    after = [module.first.weight, module.again.bias, module.other.weight, module.other.bias]
    assert all(one is other for one, other in zip(tensors, after, strict=True))


def test_what_counts_as_a_loss_of_a_batch() -> None:
    def kind(loss: Any) -> type:
        return type("Kind", (nn.Module,), {"loss": loss})

    assert has_loss(kind(lambda self, batch: None))
    assert has_loss(kind(lambda self, batch, weight=1.0: None))
    assert has_loss(kind(staticmethod(lambda batch: None)))
    assert not has_loss(kind(lambda self, predictions, target: None))
    assert not has_loss(kind(lambda self: None))
    assert not has_loss(kind(lambda self, *batches: None))
    assert not has_loss(kind(lambda self, *, batch: None))
    assert not has_loss(kind(nn.MSELoss()))
    assert not has_loss(kind(None))
    assert not has_loss(nn.Linear)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_loss_of_one_element_is_a_number(shape: tuple[int, ...]) -> None:
    loss = BatchLoss(nn.Linear(1, 1), None, lambda module, _: module.weight.sum().reshape(shape))
    assert loss({"weight": torch.tensor([[2.0]]), "bias": torch.zeros(1)}) == 2.0


@pytest.mark.parametrize("value", [None, 1.0, torch.ones(2), {"loss": torch.ones(())}])
def test_what_is_not_one_number_is_refused(value: Any) -> None:
    loss = BatchLoss(nn.Linear(1, 1), None, lambda *_: value)
    with pytest.raises(ValueError, match="`loss` must return the loss, one number, got"):
        loss(loss.parameters)


def test_a_caches_first_use_is_no_consequence() -> None:
    class Caches(Foreign):
        @cached_property
        def scale(self) -> Tensor:
            return torch.ones(())

        def loss(self, batch: Any) -> Tensor:
            return self.scale * self.training_step(batch, 0)

    module = Caches()
    loss = BatchLoss(module, (INPUTS, TARGETS))
    loss(loss.parameters)
    assert "scale" not in vars(module)


def test_a_loss_that_is_not_the_one_that_is_descended_on_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(Foreign):
        def loss(self, batch: Any) -> Tensor:
            return 2 * super().training_step(batch, 0)

    fit(tmp_path, Other(), [LearningRateEffects(1, 1)])
    (line,) = [each for each in caplog.messages if "descent_ratio" in each]
    assert "the loss is " in line
    assert "where `training_step` returned " in line
    assert "descent_ratio" not in (tmp_path / "metrics.csv").read_text()


def test_training_step_may_be_vouched_for_and_may_return_its_number_in_a_row(tmp_path: Path) -> None:
    class Row(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx).reshape(1)

    ratios = []
    for kind in (Foreign, Row):
        seed_everything(0, verbose=False)
        folder = tmp_path / kind.__name__
        trainer = fit(folder, kind(), [LearningRateEffects(1, 1, loss="training_step")])
        header, *rows = (folder / "metrics.csv").read_text().splitlines()
        place = header.split(",").index("learning_rate_effect/descent_ratio")
        ratios.append([float(row.split(",")[place]) for row in rows if row.split(",")[place]])
        assert len(ratios[-1]) == trainer.global_step
    assert ratios[0] == ratios[1]


def test_a_copied_batch_shares_nothing_that_can_change() -> None:
    batch = {"rows": [torch.ones(2), (torch.zeros(1), "text")], "more": deque([1])}
    twin = copied(batch, torch.float64)
    batch["rows"][0].add_(1)
    batch["rows"].pop()
    batch.pop("more")
    assert twin["rows"][0].tolist() == [1.0, 1.0]
    assert twin["rows"][0].dtype == torch.float64
    assert twin["rows"][1][1] == "text"
    assert twin["more"] == deque([1])
