"""The observers against an independent recorder, in every setting that a Trainer has."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer, lr_scheduler
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanSquaredError

from downslope.callbacks import GradientMonitor, LearningRateEffects
from tests.conftest import read_events, scalars

NUM_BATCHES = 10
RATE = 0.05
FLOAT32 = 2e-5  # another order of sums
Parameters = dict[str, Tensor]


@dataclass
class Step:
    """What the recorder saw of one optimizer step."""

    index: int
    before: Parameters
    after: Parameters
    unclipped: Parameters
    applied: Parameters
    rates: list[float]
    optimizer: Optimizer


@dataclass
class Recorder:
    """Sees every gradient as it is added up, and every step from its optimizer's own hooks; knows no callback."""

    module: "Net"
    steps: list[Step] = field(default_factory=list)

    def attach(self) -> None:
        self.names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self.seen: Parameters = {}
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._see)
        for optimizer in self.module.trainer.optimizers:
            optimizer.register_step_pre_hook(self._before)
            optimizer.register_step_post_hook(self._after)

    def _see(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        scale = self.module.scaler.get_scale() if self.module.scaler else 1.0
        self.seen[self.names[id(parameter)]] = parameter.grad.detach().clone() / scale

    def _held(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        return {self.names[id(each)]: each for group in optimizer.param_groups for each in group["params"]}

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        self.parameters = {name: each.detach().clone() for name, each in self._held(optimizer).items()}

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        held = {name: each for name, each in self._held(optimizer).items() if each.grad is not None}
        self.steps.append(
            Step(
                index=self.module.trainer.global_step if self.module.counts else len(self.steps),
                before=self.parameters,
                after={name: each.detach().clone() for name, each in self._held(optimizer).items()},
                unclipped={name: self.seen[name] for name in held},
                applied={name: each.grad.detach().clone() for name, each in held.items()},
                rates=[group["lr"] for group in optimizer.param_groups],
                optimizer=optimizer,
            )
        )


class Net(LightningModule):
    """A small network with automatic optimization; the settings below change a thing at a time."""

    scaler: Any = None
    counts = True

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, 1)
        self.recorder = Recorder(self)

    def on_train_start(self) -> None:
        self.recorder.attach()

    def forward(self, features: Tensor) -> Tensor:
        prediction: Tensor = self.last(torch.tanh(self.first(features))).squeeze(-1)
        return prediction

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]).to(batch[1].dtype), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=RATE)


class Validated(Net):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        torch.rand(3)


class Groups(Net):
    def configure_optimizers(self) -> Any:
        return SGD([{"params": self.first.parameters(), "lr": 0.1}, {"params": self.last.parameters()}], lr=RATE)


class StepSchedule(Net):
    interval = "step"

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=RATE)
        scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


class EpochSchedule(StepSchedule):
    interval = "epoch"


class Odd(Net):
    """Frozen, unused, tied and empty parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.tied = self.first
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.tied.weight.sum() * self.frozen(features))) + self.empty.sum()


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features + self.table((features[:, 0] > 0).long()))


class Overflow(Net):
    """Under a GradScaler: the third batch's gradient overflows float16, and its step is skipped."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch) * (1e38 if batch_idx == 2 else 1.0)


class WithLBFGS(Net):
    def configure_optimizers(self) -> Any:
        return LBFGS(self.parameters(), lr=0.5, max_iter=3)


class WithAdam(Net):
    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), lr=RATE)


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        # The eager backend: what a compiler would generate is not what is tested here, the wrapper is.
        self.first = torch.compile(self.first, backend="eager")


class Manual(Net):
    """The same with manual optimization."""

    every = 1

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = self.loss(batch) / self.every
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0 or batch_idx + 1 == NUM_BATCHES:
            self.clip()
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def clip(self) -> None:
        """Nothing by default."""


class ManualAccumulation(Manual):
    every = 4


class ManualClip(Manual):
    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class ManualLightningClip(Manual):
    def clip(self) -> None:
        self.clip_gradients(self.optimizers().optimizer, gradient_clip_val=0.02, gradient_clip_algorithm="value")


class ManualPlainBackward(ManualClip):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.clip()
        optimizer.step()
        return loss


class ManualRawOptimizer(ManualClip):
    counts = False  # Lightning's global_step stands still

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clip()
        optimizer.step()
        return loss


class ManualStepSchedule(Manual):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=RATE)
        return [optimizer], [lr_scheduler.ExponentialLR(optimizer, gamma=0.8)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.lr_schedulers().step()
        return loss


class Adversaries(Net):
    """Two optimizers that alternate, each leaving gradients in the other's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = torch.zeros(())
        for optimizer in self.optimizers():
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)  # reaches the other's parameters as well
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [SGD(self.first.parameters(), lr=RATE), SGD(self.last.parameters(), lr=2 * RATE)]


def half() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


SETTINGS: dict[str, tuple[type[Net], Callable[[], dict[str, Any]]]] = {
    "plain": (Net, dict),
    "accumulation with a last incomplete window": (Net, lambda: {"accumulate_grad_batches": 4}),
    "clipping by norm": (Net, lambda: {"gradient_clip_val": 0.05}),
    "clipping by value": (Net, lambda: {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "accumulation and clipping": (Net, lambda: {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}),
    "bf16-mixed": (Net, lambda: {"precision": "bf16-mixed"}),
    "fp16 with a skipped step": (Overflow, half),
    "several parameter groups": (Groups, dict),
    "a schedule by step": (StepSchedule, dict),
    "a schedule by epoch": (EpochSchedule, lambda: {"max_epochs": 3}),
    "frozen, unused, tied, empty": (Odd, dict),
    "sparse": (Sparse, dict),
    "compiled": (Compiled, dict),
    "validation in mid-epoch": (Validated, lambda: {"val_check_interval": 3}),
    "manual": (Manual, dict),
    "manual accumulation": (ManualAccumulation, dict),
    "manual clipping by torch": (ManualClip, dict),
    "manual clipping by Lightning": (ManualLightningClip, dict),
    "manual, plain backward, clipped": (ManualPlainBackward, dict),
    "manual, raw optimizer, clipped": (ManualRawOptimizer, dict),
    "manual, a schedule by step": (ManualStepSchedule, dict),
    "manual bf16-mixed": (Manual, lambda: {"precision": "bf16-mixed"}),
    "manual fp16": (Manual, half),
    "two optimizers": (Adversaries, dict),
    "LBFGS": (WithLBFGS, dict),
    "Adam": (WithAdam, dict),
}


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(4 * NUM_BATCHES, 3, generator=generator)
    target = torch.randn(4 * NUM_BATCHES, generator=generator)
    return DataLoader(torch.utils.data.TensorDataset(features, target), batch_size=4)


def fit(kind: type[Net], observers: list[Any], logger: Any, fit_arguments: Any = None, **settings: Any) -> Net:
    seed_everything(0, verbose=False)
    module = kind()
    trainer = Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": logger,
            "callbacks": observers,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **settings,
        }
    )
    module.scaler = getattr(trainer.precision_plugin, "scaler", None)
    loaders = (batches(), batches()) if "val_check_interval" in settings else (batches(),)
    trainer.fit(module, *loaders, **(fit_arguments or {}))
    return module


def observers() -> list[Any]:
    return [GradientMonitor(1, histogram_every_n_steps=1), LearningRateEffects(1, descent_ratio_every_n_steps=1)]


def vector(tensors: Parameters) -> Tensor:
    return torch.cat([tensor.to_dense().double().flatten() for tensor in tensors.values()])


def plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def expected_tags(steps: list[Step], names: dict[int, str]) -> dict[str, list[tuple[int, float]]]:
    """Every tag of both observers by arithmetic in float64."""
    tags: dict[str, list[tuple[int, float]]] = {}
    last: dict[int, tuple[int, Parameters]] = {}
    for step in steps:
        name = names[id(step.optimizer)]
        suffix = f"/{name}" if len(names) > 1 else ""

        def write(tag: str, value: float, index: int = step.index) -> None:
            tags.setdefault(tag, []).append((index, value))

        write(f"gradient_norm/total{suffix}", float(vector(step.unclipped).norm()))
        write(f"gradient_norm/applied{suffix}", float(vector(step.applied).norm()))
        for each, gradient in step.unclipped.items():
            write(f"gradient_norm/{plain(each)}", float(gradient.to_dense().double().norm()))
        change = {each: step.after[each].double() - step.before[each].double() for each in step.before}
        write(f"update_ratio/total{suffix}", float(vector(change).norm() / vector(step.before).norm()))
        for each in step.applied:
            if step.before[each].numel():
                write(f"update_ratio/{plain(each)}", float(change[each].norm() / step.before[each].double().norm()))
        write(
            f"learning_rate_effect/effective{suffix}",
            float(vector(change).norm() / vector(step.applied).norm()),
        )
        for group, rate in enumerate(step.rates):
            write(f"learning_rate/{name}" + (f"/{group}" if len(step.rates) > 1 else ""), rate)
        if id(step.optimizer) in last:
            one, other = vector(last[id(step.optimizer)][1]), vector(step.applied)
            write(f"learning_rate_effect/gradient_cosine{suffix}", float(one @ other / (one.norm() * other.norm())))
        last[id(step.optimizer)] = (step.index, step.applied)
    return tags


Check = Callable[[Net, Path], None]


def compare_with_the_recorder(module: Net, folder: Path) -> None:
    """Every tag that was written, against the arithmetic."""
    optimizers = module.trainer.optimizers
    names = {id(each): ("SGD-1" if index else type(each).__name__) for index, each in enumerate(optimizers)}
    expected = expected_tags(module.recorder.steps, names)
    events = read_events(folder)
    compared = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.split("/")[0] in {"gradient_norm", "update_ratio", "learning_rate"}
        or "effective" in tag
        or "cosine" in tag
    }
    compared.pop("update_ratio/empty", None)  # 0 / 0
    assert set(compared) == set(expected)
    for tag, values in expected.items():
        assert [step for step, _ in compared[tag]] == [step for step, _ in values], tag
        assert [value for _, value in compared[tag]] == pytest.approx(
            [value for _, value in values], rel=FLOAT32, abs=1e-6
        ), tag


def keep_the_ledger(module: Net, _: Path, clipped: bool = False) -> None:
    """θₜ₊₁ = θₜ − η g, to the last bit, with the gradient g that arrived, or what was left of it after clipping."""
    for step in module.recorder.steps:
        gradients = step.applied if clipped else step.unclipped
        for rate, group in zip(step.rates, step.optimizer.param_groups, strict=True):
            for name in {module.recorder.names[id(each)] for each in group["params"]} & gradients.keys():
                assert torch.equal(step.after[name], step.before[name].add(gradients[name], alpha=-rate)), name


def keep_the_ledger_of_what_was_written(module: Net, folder: Path) -> None:
    """The same, from the parameters, gradients and rates in the event file alone: what a reader can prove."""
    events = read_events(folder)
    written = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    rates = {step: value for tag in written if tag.startswith("learning_rate/") for step, value in written[tag].items()}
    num_proved = 0
    for name, parameter in module.named_parameters():
        places = [f"{plain(name)}[{','.join(map(str, index))}]" for index in np.ndindex(parameter.shape)]
        if not places or f"gradient_value/{places[0]}" not in written:
            continue
        rows = {
            step: [
                torch.tensor([written[f"{kind}_value/{place}"][step] for place in places]).view_as(parameter)
                for kind in ("parameter", "gradient")
            ]
            for step in written[f"gradient_value/{places[0]}"]
        }
        for (step, (before, gradient)), (_, (after, _)) in itertools.pairwise(rows.items()):
            assert torch.equal(after, before.add(gradient, alpha=-rates[step])), (name, step)
            num_proved += 1
    assert num_proved


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The `srun` command is available")
def test_every_figure_is_that_of_the_recorder(tmp_path: Path, name: str) -> None:
    kind, settings = SETTINGS[name]
    module = fit(kind, observers(), TensorBoardLogger(tmp_path, name="", version=""), **settings())
    assert len(module.recorder.steps) >= 3
    compare_with_the_recorder(module, tmp_path)
    if kind not in (WithLBFGS, WithAdam):
        keep_the_ledger(module, tmp_path, clipped="clip" in name)
    # Several groups have several rates, and a sparse step subtracts the duplicates of a row one by one.
    if kind not in (WithLBFGS, WithAdam, Groups, Sparse) and "clip" not in name:
        keep_the_ledger_of_what_was_written(module, tmp_path)
    if "fp16 with" in name:
        assert [step.index for step in module.recorder.steps] == [0, 1, *range(3, NUM_BATCHES)]


@pytest.mark.parametrize(
    "name", ["clipping by norm", "bf16-mixed", "frozen, unused, tied, empty", "sparse", "two optimizers"]
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_every_figure_of_many_elements_is_that_of_the_recorder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for constant in ("gradient_monitor.MANY", "gradient_monitor.SMALL_MODEL", "learning_rate_effects.MANY"):
        monkeypatch.setattr(f"downslope.callbacks.{constant}", 0)
    kind, settings = SETTINGS[name]
    module = fit(kind, observers(), TensorBoardLogger(tmp_path, name="", version=""), **settings())
    compare_with_the_recorder(module, tmp_path)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_observing_changes_no_bit(tmp_path: Path, name: str) -> None:
    kind, settings = SETTINGS[name]
    watched = fit(kind, observers(), TensorBoardLogger(tmp_path, name="", version=""), **settings())
    alone = fit(kind, [], False, **settings())
    assert all(torch.equal(*pair) for pair in zip(watched.parameters(), alone.parameters(), strict=True))


class Planted(Net):
    """A gradient becomes a thousandth larger after the recorder has seen it, before the observers do."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.last.bias.register_post_accumulate_grad_hook(self.plant)

    def plant(self, bias: Tensor) -> None:
        assert bias.grad is not None
        bias.grad *= 1.001


class PlantedBeforeTheStep(Manual):
    """The same after everybody has seen it."""

    def clip(self) -> None:
        assert self.last.bias.grad is not None
        self.last.bias.grad *= 1.001


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Planted, compare_with_the_recorder),
        (Planted, keep_the_ledger),
        (PlantedBeforeTheStep, keep_the_ledger),
        (PlantedBeforeTheStep, keep_the_ledger_of_what_was_written),
    ],
)
def test_a_gradient_that_is_a_thousandth_off_is_caught(tmp_path: Path, kind: type[Net], check: Check) -> None:
    honest = fit(kind.__base__, observers(), TensorBoardLogger(tmp_path / "honest", name="", version=""))
    check(honest, tmp_path / "honest")
    module = fit(kind, observers(), TensorBoardLogger(tmp_path / "planted", name="", version=""))
    with pytest.raises(AssertionError):
        check(module, tmp_path / "planted")


def test_adam_is_that_of_an_independent_step_in_float64(tmp_path: Path) -> None:
    module = fit(WithAdam, observers(), TensorBoardLogger(tmp_path, name="", version=""), precision="64-true")
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for count, step in enumerate(module.recorder.steps, start=1):
        for name, gradient in step.applied.items():
            assert gradient.dtype == torch.float64
            first, second = moments.get(name, (torch.zeros(()).double(), torch.zeros(()).double()))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            moments[name] = first, second
            change = RATE * first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            torch.testing.assert_close(step.after[name], step.before[name] - change, rtol=1e-12, atol=1e-14)
    assert count == NUM_BATCHES


def loss_by_hand(parameters: Parameters, batch: list[Tensor]) -> Tensor:
    hidden = torch.tanh(batch[0].double() @ parameters["first.weight"].double().T + parameters["first.bias"].double())
    prediction = (hidden @ parameters["last.weight"].double().T + parameters["last.bias"].double())[:, 0]
    return (prediction - batch[1].double()).square().mean()


@pytest.mark.parametrize(
    ("kind", "settings", "window"),
    [
        (Net, {}, 1),
        (Net, {"accumulate_grad_batches": 4}, 4),
        (Manual, {}, 1),
        (ManualPlainBackward, {}, 1),
        (WithAdam, {}, 1),
        (StepSchedule, {}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_descent_ratio_is_the_change_of_the_loss_over_the_promise(
    tmp_path: Path, kind: type[Net], settings: dict[str, Any], window: int
) -> None:
    module = fit(kind, observers(), TensorBoardLogger(tmp_path, name="", version=""), **settings)
    data = list(batches())
    logged = scalars(tmp_path, "learning_rate_effect/descent_ratio")
    assert [step for step, _ in logged] == [step.index for step in module.recorder.steps]
    for index, step in enumerate(module.recorder.steps):
        seen = data[index * window : (index + 1) * window]
        change = sum(loss_by_hand(step.after, batch) - loss_by_hand(step.before, batch) for batch in seen) / window
        promise = -step.rates[0] * vector(step.applied).square().sum()
        # The change is a difference of two float32 losses.
        assert logged[index][1] == pytest.approx(float(change / promise), abs=float(1e-6 / abs(promise)) + 1e-5)


def test_the_descent_ratio_of_a_parabola_is_one_minus_half_the_stability(tmp_path: Path) -> None:
    class Parabola(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.last = nn.Linear(1, 1, bias=False)

        def loss(self, batch: list[Tensor]) -> Tensor:
            return 4.0 * self.first.weight.square().sum()  # λ = 8, so that η λ / 2 = 0.2

    fit(Parabola, observers(), TensorBoardLogger(tmp_path, name="", version=""))
    ratios = [value for _, value in scalars(tmp_path, "learning_rate_effect/descent_ratio")]
    assert ratios == pytest.approx([0.8] * NUM_BATCHES, rel=1e-4)
    cosines = [value for _, value in scalars(tmp_path, "learning_rate_effect/gradient_cosine")]
    assert cosines == pytest.approx([1.0] * (NUM_BATCHES - 1))


class Noisy(Net):
    """Dropout, batch norm, metrics and numpy's random numbers: all of which a second forward could disturb.

    Not Python's own: beartype, which holds the shapes in these tests, draws from them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.metric = MeanSquaredError()
        self.values = CatMetric()

    def loss(self, batch: list[Tensor]) -> Tensor:
        features = self.dropout(self.norm(batch[0])) * (1 + np.random.rand())  # noqa: NPY002
        prediction = self(features)
        self.metric.update(prediction.detach(), batch[1])
        self.values.update(prediction.detach())
        return nn.functional.mse_loss(prediction, batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.log_dict({"again": loss})
        return loss


class NoisyManual(Noisy, Manual):
    training_step = Manual.training_step


@pytest.mark.parametrize("kind", [Noisy, NoisyManual])
def test_the_second_forward_leaves_no_trace(tmp_path: Path, kind: type[Noisy]) -> None:
    ends = []
    for folder, watching in (("watched", observers()), ("alone", [])):
        module = fit(kind, watching, CSVLogger(tmp_path / folder, name="", version=""), log_every_n_steps=1)
        ends.append(
            [
                *module.state_dict().values(),
                module.metric.compute(),
                module.values.compute(),
                torch.rand(2),
                torch.from_numpy(np.random.rand(2)),  # noqa: NPY002
            ]
        )
        assert "log" not in module.__dict__
    assert [torch.equal(*pair) for pair in zip(*ends, strict=True)] == [True] * len(ends[0])


def test_the_second_forward_reaches_no_logger(tmp_path: Path) -> None:
    class Direct(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.logger.log_metrics({"direct": 1.0}, batch_idx)
            return super().training_step(batch, batch_idx)

    fit(
        Direct,
        [LearningRateEffects(1, descent_ratio_every_n_steps=1)],
        TensorBoardLogger(tmp_path, name="", version=""),
    )
    assert [step for step, _ in scalars(tmp_path, "direct")] == list(range(NUM_BATCHES))
    assert len(scalars(tmp_path, "learning_rate_effect/descent_ratio")) == NUM_BATCHES


class WithCriterion(LightningModule):
    """What it calls its loss takes predictions, and no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.line = nn.Linear(3, 1)
        self.loss = nn.MSELoss()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss: Tensor = self.loss(self.line(batch[0])[:, 0], batch[1])
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=RATE)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WithCriterion, "WithCriterion has no method `loss(batch)`: add one, or give the callback `loss=`"),
        (WithLBFGS, "LBFGS evaluates the loss many times a step"),
        (Adversaries, "there are several optimizers"),
    ],
)
def test_the_log_says_once_why_there_is_no_descent_ratio(
    tmp_path: Path, kind: type[Net], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    fit(kind, observers(), TensorBoardLogger(tmp_path, name="", version=""))
    said = [message for message in caplog.messages if "learning_rate_effect/descent_ratio" in message]
    assert len(said) == 1
    assert reason in said[0]
    assert "learning_rate_effect/descent_ratio" not in read_events(tmp_path).Tags()["scalars"]


def test_a_manual_step_that_returns_no_loss_has_the_same_descent_ratio(tmp_path: Path) -> None:
    class Silent(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

    tag = "learning_rate_effect/descent_ratio"
    fit(Silent, observers(), TensorBoardLogger(tmp_path / "silent", name="", version=""))
    fit(Manual, observers(), TensorBoardLogger(tmp_path / "manual", name="", version=""))
    assert scalars(tmp_path / "silent", tag) == scalars(tmp_path / "manual", tag)
    assert len(scalars(tmp_path / "silent", tag)) == NUM_BATCHES


def test_without_a_logger_nothing_is_attached() -> None:
    module = fit(Net, observers(), False)
    assert not any(
        isinstance(handle, GradientMonitor) for handle in module.trainer.optimizers[0]._optimizer_step_post_hooks
    )
    assert len(module.trainer.optimizers[0]._optimizer_step_post_hooks) == 1  # the recorder's


def test_a_logger_that_is_not_tensorboard_gets_scalars(tmp_path: Path) -> None:
    fit(Net, observers(), CSVLogger(tmp_path, name="", version=""))
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"gradient_norm/total", "learning_rate_effect/effective", "update_ratio/total"} <= set(header.split(","))
    assert len(rows) >= NUM_BATCHES


def test_a_resumed_run_goes_on_with_its_steps(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.ckpt"
    first = fit(Net, observers(), TensorBoardLogger(tmp_path / "first", name="", version=""))
    first.trainer.save_checkpoint(checkpoint)
    fit(
        Net,
        observers(),
        TensorBoardLogger(tmp_path / "second", name="", version=""),
        max_epochs=2,
        fit_arguments={"ckpt_path": checkpoint, "weights_only": True},
    )
    whole = fit(Net, observers(), TensorBoardLogger(tmp_path / "whole", name="", version=""), max_epochs=2)
    assert len(whole.recorder.steps) == 2 * NUM_BATCHES
    for tag in ("gradient_norm/total", "learning_rate_effect/effective", "learning_rate/SGD"):
        parts = scalars(tmp_path / "first", tag) + scalars(tmp_path / "second", tag)
        assert parts == scalars(tmp_path / "whole", tag)


def test_the_infinity_norm_and_a_glob(tmp_path: Path) -> None:
    monitor = GradientMonitor(every_n_steps=1, norm_type=inf, parameters="last.*")
    module = fit(Net, [monitor], TensorBoardLogger(tmp_path, name="", version=""))
    tags = [tag for tag in read_events(tmp_path).Tags()["scalars"] if tag.startswith("gradient_norm/")]
    assert set(tags) == {f"gradient_norm/{each}" for each in ("total", "applied", "last.weight", "last.bias")}
    largest = [float(vector(step.unclipped).abs().max()) for step in module.recorder.steps]
    assert [value for _, value in scalars(tmp_path, "gradient_norm/total")] == pytest.approx(largest)


def test_another_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`norm_type` must be 2 or inf, got 1"):
        GradientMonitor(norm_type=1)


def test_the_dashboard_has_a_layout(tmp_path: Path) -> None:
    fit(Net, observers(), TensorBoardLogger(tmp_path, name="", version=""))
    tensor = read_events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor.string_val[0])
    assert [category.title for category in layout.category] == ["Loss", "Gradients", "Learning-rate effects"]


def test_a_full_disk_is_warned_of_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logger.experiment.file_writer.event_writer._general_file_writer, "write", full)
    watched = fit(Net, observers(), logger)
    alone = fit(Net, [], False)
    said = [message for message in caplog.messages if "training continues" in message]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert all(torch.equal(*pair) for pair in zip(watched.parameters(), alone.parameters(), strict=True))


def spoiled(kind: type[Net]) -> type[Net]:
    """The third batch's loss, and with it every gradient and every weight from then on, is no number."""

    class Spoiled(kind):  # type: ignore[misc, valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return super().training_step([batch[0], batch[1] * (nan if batch_idx == 2 else 1.0)], batch_idx)

    return Spoiled


@pytest.mark.parametrize("kind", [Net, Manual, ManualClip, ManualRawOptimizer])
def test_gradients_that_are_no_numbers_are_warned_of_once_and_training_goes_on(
    tmp_path: Path, kind: type[Net], caplog: pytest.LogCaptureFixture
) -> None:
    watched = fit(spoiled(kind), observers(), TensorBoardLogger(tmp_path, name="", version=""))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message for message in said if "training continues" in message] == [
        "gradient/first.weight is not finite at step 2: histograms show the finite values only; training continues."
    ]
    alone = fit(spoiled(kind), [], False)
    for pair in zip(watched.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)
    written = scalars(tmp_path, "gradient_norm/total")
    assert [step for step, _ in written] == list(range(NUM_BATCHES))
    assert [isfinite(value) for _, value in written] == [True] * 2 + [False] * (NUM_BATCHES - 2)
    assert [event.step for event in read_events(tmp_path).Histograms("gradient/first.weight")] == [0, 1]
