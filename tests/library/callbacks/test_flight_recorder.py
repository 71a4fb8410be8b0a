import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader

from downslope.callbacks import Checkpoints, DivergenceError, FlightRecorder, flight_recorder
from downslope.gradients import finiteness, vectors
from downslope.gradients.finiteness import wide_norms
from downslope.steps import measured_step

MODES = ["automatic", "wrapper", "plain", "raw"]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05),
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=0.05),
    "adamw": lambda parameters: AdamW(parameters, lr=0.05, amsgrad=True),
}
BAD = 5  # the batch, and the optimizer step, at which something is planted
PER_EPOCH = 4


class Foreign(LightningModule):
    """Somebody else's module, in each of the four ways to take a step; `spoil` plants what goes wrong."""

    def __init__(self, mode: str = "automatic", optimizer: str = "sgd", clip: float | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.automatic_optimization = mode == "automatic"
        self.mode = mode
        self.optimizer = OPTIMIZERS[optimizer]
        self.clip = clip
        self.spoil: Callable[[Foreign, Tensor], Tensor] | None = None
        self.num_batches = 0

    def training_step(self, batch: Any) -> Tensor:
        features, target = batch["x"], batch["more"][0]
        loss = nn.functional.mse_loss(self.net(features).squeeze(-1), target)
        if self.spoil and self.num_batches == BAD:
            loss = self.spoil(self, loss)
        self.num_batches += 1
        if self.automatic_optimization:
            return loss
        wrapped = self.optimizers()
        assert not isinstance(wrapped, list)
        optimizer = wrapped.optimizer if self.mode == "raw" else wrapped
        optimizer.zero_grad()
        if self.mode == "wrapper":
            self.manual_backward(loss)
        else:
            loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        optimizer.step()
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())


def batches(num: int = PER_EPOCH, broken: int | None = None) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(7)
    rows = [
        {"x": torch.randn(8, 3, generator=generator), "more": (torch.randn(8, generator=generator), "a name")}
        for _ in range(num)
    ]
    if broken is not None:
        rows[broken]["x"][2, 1] = math.nan
    return DataLoader(rows, batch_size=None)


def fit(module: LightningModule, *callbacks: Callback, data: DataLoader[Any] | None = None, **settings: Any) -> Trainer:
    options = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | settings
    trainer = Trainer(callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(module, data or batches())
    return trainer


def foreign(*arguments: Any) -> Foreign:
    seed_everything(0, verbose=False)
    return Foreign(*arguments)


def stopped(folder: Path, module: Foreign, *callbacks: Callback, **settings: Any) -> tuple[FlightRecorder, Trainer]:
    recorder = FlightRecorder(folder=str(folder))
    with pytest.warns(UserWarning, match=r"Diverged: .* See .*flight_record.json"):
        trainer = fit(module, recorder, *callbacks, **settings)
    assert recorder.diverged
    return recorder, trainer


def read(folder: Path) -> dict[str, Any]:
    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no JSON")

    record: dict[str, Any] = json.loads((folder / "flight_record.json").read_text(), parse_constant=refuse)
    return record


def state(module: LightningModule, trainer: Trainer) -> dict[str, Tensor]:
    tensors = dict(module.state_dict())
    for index, values in trainer.optimizers[0].state_dict()["state"].items():
        tensors |= {f"{index}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors


def assert_as_after_five_good_steps(module: Foreign, trainer: Trainer, optimizer: str = "sgd") -> None:
    """Compares with a run that nobody watched, and that was told to end just before the step."""
    witness = foreign(module.mode, optimizer, module.clip)
    before = Interruption()
    with pytest.raises(KeyError, match="enough"):
        fit(witness, before)
    want, got = before.state, state(module, trainer)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


class Interruption(Callback):
    """Ends training before the bad batch, in every mode alike."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * PER_EPOCH + batch_idx == BAD:
            self.state = state(pl_module, trainer)
            raise KeyError("enough")


def nan_loss(module: Foreign, loss: Tensor) -> Tensor:
    return loss * math.nan


def nan_gradient(module: Foreign, loss: Tensor) -> Tensor:
    return plant(module, loss, math.nan)


def inf_gradient(module: Foreign, loss: Tensor) -> Tensor:
    return plant(module, loss, math.inf)


def plant(module: Foreign, loss: Tensor, value: float) -> Tensor:
    """Leaves the loss as it is, and spoils one gradient."""
    bias = module.net[3].bias
    handle = bias.register_hook(lambda gradient: gradient * value)
    bias.register_post_accumulate_grad_hook(lambda _: handle.remove())
    return loss


def growth(module: Foreign, loss: Tensor) -> Tensor:
    return loss * 1e8


PLANTS = {"loss": nan_loss, "gradient": nan_gradient, "growth": growth}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reason", PLANTS)
def test_the_weights_are_those_of_a_run_that_ended_before_the_step(tmp_path: Path, mode: str, reason: str) -> None:
    module = foreign(mode, "momentum")
    module.spoil = PLANTS[reason]
    _, trainer = stopped(tmp_path, module)
    assert_as_after_five_good_steps(module, trainer, "momentum")
    record = read(tmp_path)
    assert record["reason"] == reason
    assert (record["step"], record["epoch"], record["batch_index"]) == (5, 1, 1)
    assert record["restored_to_step"] == 5
    assert record["learning_rate"] == 0.05
    assert len(record["steps"]) == 5
    assert trainer.state.finished
    assert trainer.current_epoch == 2
    assert module.num_batches == 6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["automatic", "wrapper"])
def test_optimizer_states_are_taken_back_too(tmp_path: Path, mode: str, optimizer: str) -> None:
    module = foreign(mode, optimizer)
    module.spoil = nan_loss
    _, trainer = stopped(tmp_path, module)
    assert_as_after_five_good_steps(module, trainer, optimizer)


@pytest.mark.parametrize("spoil", [nan_gradient, inf_gradient])
@pytest.mark.parametrize(("mode", "clip"), [(mode, None) for mode in MODES] + [("wrapper", 1.0)])
def test_the_parameter_is_named(
    tmp_path: Path, mode: str, clip: float | None, spoil: Callable[[Foreign, Tensor], Tensor]
) -> None:
    module = foreign(mode, "adam", clip)
    module.spoil = spoil
    stopped(tmp_path, module)
    record = read(tmp_path)
    assert (record["reason"], record["parameter"]) == ("gradient", "net.3.bias")
    assert record["why"].startswith("the gradient of net.3.bias became ")
    others = {name: norm for name, norm in record["gradient_norms"].items() if name != "net.3.bias"}
    assert len(others) == 5
    assert all(isinstance(norm, float) for norm in others.values())


def test_the_trainers_clip_hides_no_name(tmp_path: Path) -> None:
    module = foreign()
    module.spoil = nan_gradient
    stopped(tmp_path, module, gradient_clip_val=1.0)
    assert read(tmp_path)["parameter"] == "net.3.bias"


def test_a_large_gradient_that_clipping_catches_is_none(tmp_path: Path) -> None:
    module = foreign()
    module.spoil = lambda module, loss: plant(module, loss, 1e30)  # its square is inf in float32
    recorder = FlightRecorder(folder=str(tmp_path))
    fit(module, recorder, gradient_clip_val=1.0)
    assert not recorder.diverged
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_a_broken_row_is_shown(tmp_path: Path, mode: str) -> None:
    module = foreign(mode)
    stopped(tmp_path, module, data=batches(broken=1))
    record = read(tmp_path)
    assert record["batch_index"] == 1
    assert record["loss"] == "nan"
    assert record["batch"]["x"]["row_numbers"] == list(range(8))
    assert record["batch"]["x"]["rows"][2][1] == "nan"
    assert record["batch"]["more"][1] == "a name"
    first = list(batches(broken=1))[1]
    assert record["batch"]["x"]["rows"][0] == first["x"][0].tolist()
    assert record["batch"]["more"][0]["rows"] == first["more"][0].tolist()
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())  # batch norm's too


class Line(LightningModule):
    """(w − 0)²/2 on one parameter: each step multiplies it by 1 − learning rate."""

    def __init__(self, learning_rate: float, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.learning_rate = learning_rate

    def training_step(self, batch: Tensor) -> Tensor:
        return self.weight.square().sum() / 2

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=self.learning_rate)


def test_every_figure_is_right(tmp_path: Path) -> None:
    # Each step multiplies the weight by 1 − 11 = −10, so that the loss is 100ᵗ/2: first beyond 1e6 times ½ at t = 4.
    module = Line(learning_rate=11.0)
    with pytest.warns(UserWarning, match="the loss grew to 5e"):
        fit(module, FlightRecorder(folder=str(tmp_path), num_steps=2), data=DataLoader(torch.zeros(9, 1)))
    record = read(tmp_path)
    assert record == {
        "why": "the loss grew to 5e+07, beyond 1e+06 × its first 0.5",
        "reason": "growth",
        "parameter": None,
        "step": 4,
        "epoch": 0,
        "batch_index": 4,
        "optimizer": "SGD",
        "learning_rate": 11.0,
        "loss": 5e7,
        "gradient_norms": {"weight": 1e4},
        "parameter_norms": {"weight": 1e5},
        "first_loss": 0.5,
        "restored_to_step": 4,
        "steps": [
            {
                "step": step,
                "epoch": 0,
                "batch_index": step,
                "optimizer": "SGD",
                "learning_rate": 11.0,
                "loss": 100.0**step / 2,
                "gradient_norms": {"weight": 10.0**step},
                "parameter_norms": {"weight": 10.0 ** (step + 1)},
            }
            for step in (2, 3)
        ],
        "batch": {"shape": [1, 1], "dtype": "float32", "row_numbers": [0], "rows": [[0.0]]},
    }
    assert module.weight.item() == 1e4


def test_a_finite_gradient_that_overflows_the_weight_is_taken_back(tmp_path: Path) -> None:
    module = Line(learning_rate=1e30, weight=1e10)
    with pytest.warns(UserWarning, match="a finite gradient made weight inf"):
        fit(module, FlightRecorder(folder=str(tmp_path)), data=DataLoader(torch.zeros(9, 1)))
    assert module.weight.item() == 1e10
    record = read(tmp_path)
    assert (record["reason"], record["parameter"], record["step"]) == ("parameter", "weight", 0)


def test_late_a_weight_that_a_finite_gradient_broke_is_not_saved(tmp_path: Path) -> None:
    module = foreign()

    def blow_up(module: Foreign, loss: Tensor) -> Tensor:
        module.optimizers().param_groups[0]["lr"] = 1e38  # type: ignore[union-attr]  # it is one, and no list
        return 1e9 * loss

    module.spoil = blow_up
    recorder = FlightRecorder(folder=str(tmp_path), mode="late")
    checkpoints = Checkpoints(str(tmp_path), every_n_steps=1, every_n_seconds=None)
    with pytest.warns(UserWarning, match="a finite gradient made"):
        fit(module, recorder, checkpoints, enable_checkpointing=True)
    assert (read(tmp_path)["reason"], read(tmp_path)["step"]) == ("parameter", 5)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in saved.values())


class Masked(Foreign):
    """A mask kept as a frozen parameter, and one that learns nothing: infinite from the beginning, and harmless."""

    def __init__(self, mode: str = "automatic") -> None:
        super().__init__(mode)
        self.mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
        self.other_mask = nn.Parameter(torch.tensor([0.0, -math.inf]))

    def training_step(self, batch: Any) -> Tensor:
        features = batch["x"] * torch.softmax(self.other_mask, 0)[0]
        return super().training_step({**batch, "x": features})


class Mending(Foreign):
    """Deals with gradients that are not finite itself, in the hook that is made for it."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.nan_to_num_(0.0)


class Weighed(Foreign):
    """A loss whose weight is warmed up from almost nothing."""

    def training_step(self, batch: Any) -> Tensor:
        return super().training_step(batch) * min(1.0, 1e-9 + self.num_batches / 20)


class PassesOver(Foreign):
    """By hand: a batch whose loss is not finite is left out."""

    def __init__(self, mode: str = "wrapper") -> None:
        super().__init__(mode)

    def training_step(self, batch: Any) -> Tensor:
        return super().training_step(batch) if self.num_batches != 3 else self._left_out()

    def _left_out(self) -> Tensor:
        self.num_batches += 1
        return torch.tensor(math.nan)


@pytest.mark.parametrize("kind", [Masked, Mending, Weighed, PassesOver])
@pytest.mark.parametrize("every_n_steps", [1, 3])
@pytest.mark.usefixtures("place")
def test_what_is_sound_is_not_ended(tmp_path: Path, kind: type[Foreign], every_n_steps: int) -> None:
    modules = []
    for observers in ([], [FlightRecorder(folder=str(tmp_path), every_n_steps=every_n_steps)]):
        seed_everything(0, verbose=False)
        module = kind()
        module.spoil = nan_loss if kind is Mending else None
        fit(module, *observers)
        modules.append(module)
        assert module.num_batches == 12
    states = [module.state_dict() for module in modules]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not list(tmp_path.iterdir())


def test_what_breaks_after_a_warm_up_is_ended(tmp_path: Path) -> None:
    class Breaks(Weighed):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch) * (1e9 if self.num_batches == 9 else 1.0)

    seed_everything(0, verbose=False)
    stopped(tmp_path, Breaks())
    record = read(tmp_path)
    assert (record["reason"], record["step"]) == ("growth", 8)


@pytest.mark.parametrize("growth", [10.0, 1e6])
def test_the_loss_may_grow_by_a_setting(tmp_path: Path, growth: float) -> None:
    recorder = FlightRecorder(folder=str(tmp_path), diverged_beyond=growth)
    with pytest.warns(UserWarning, match="the loss grew"):
        fit(Line(learning_rate=11.0), recorder, data=DataLoader(torch.zeros(9, 1)))
    assert read(tmp_path)["step"] == {10.0: 1, 1e6: 4}[growth]


def test_poisoned_parameters_are_replaced(tmp_path: Path) -> None:
    def poison(module: Foreign, loss: Tensor) -> Tensor:
        module.net[3].weight.data.fill_(math.nan)
        return module.net(torch.zeros(8, 3)).mean()

    module = foreign()
    module.spoil = poison
    checkpoints = Checkpoints(str(tmp_path), every_n_seconds=0.0)
    _, trainer = stopped(tmp_path, module, checkpoints, enable_checkpointing=True)
    assert_as_after_five_good_steps(module, trainer)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(last[name], value) for name, value in module.state_dict().items())


def test_raising_comes_after_the_weights_are_saved(tmp_path: Path) -> None:
    module = foreign("automatic", "momentum")
    module.spoil = nan_loss
    with pytest.raises(DivergenceError, match=r"Diverged: the loss became nan.* at step 5 \(epoch 1, batch 1\)"):
        fit(module, FlightRecorder(folder=str(tmp_path), on_divergence="raise"))
    assert read(tmp_path)["step"] == 5
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())


def test_continuing_changes_nothing(tmp_path: Path) -> None:
    modules = foreign(), foreign()
    for module in modules:
        module.spoil = growth
    with pytest.warns(UserWarning, match="Diverged"):
        fit(modules[0], FlightRecorder(folder=str(tmp_path), on_divergence="continue"))
    fit(modules[1])
    assert modules[0].num_batches == 12
    assert read(tmp_path)["restored_to_step"] is None
    assert all(torch.equal(*pair) for pair in zip(*(module.state_dict().values() for module in modules), strict=True))


def test_a_step_outside_of_any_batch_is_watched_too(tmp_path: Path) -> None:
    class Early(Line):
        def on_train_start(self) -> None:
            self.weight.grad = torch.tensor([math.inf])
            self.trainer.optimizers[0].step()

    module = Early(learning_rate=0.1)
    with pytest.warns(UserWarning, match="the gradient of weight became inf at step 0"):
        fit(module, FlightRecorder(folder=str(tmp_path)), data=DataLoader(torch.zeros(9, 1)))
    assert module.weight.item() == 1.0
    assert read(tmp_path)["batch"] is None  # the first one is not to blame


def test_validation_alone_is_not_its_affair() -> None:
    class Validated(Foreign):
        def validation_step(self, batch: Any) -> None: ...

    recorder = FlightRecorder()
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(callbacks=[recorder], accelerator="cpu", **settings)
    trainer.validate(Validated(), batches(), verbose=False)
    assert not recorder.diverged


def test_it_stops_before_the_least_number_of_epochs(tmp_path: Path) -> None:
    module = foreign()
    module.spoil = nan_loss
    stopped(tmp_path, module, min_epochs=3, min_steps=10)
    assert module.num_batches == 6


@pytest.mark.parametrize("mode", MODES)
def test_watching_changes_no_bit(mode: str) -> None:
    watched, alone = foreign(mode, "adam"), foreign(mode, "adam")
    recorder = FlightRecorder()
    trainers = fit(watched, recorder, max_epochs=2), fit(alone, max_epochs=2)
    states = state(watched, trainers[0]), state(alone, trainers[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert not recorder.diverged


class Witness(Callback):
    """Looks for itself: the loss that comes out, the gradients that torch leaves."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, list[float], float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        norms = [float((parameter.grad**2).sum().sqrt()) for parameter in pl_module.parameters()]
        self.steps.append((float(outputs["loss"]), norms, trainer.optimizers[0].param_groups[0]["lr"]))


@pytest.fixture(params=["cpu", "as on a GPU", "by what torch documents"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU norms stay tensors until they are read: so it is done here, on the CPU."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(measured_step, "norms_now", wide_norms)
        monkeypatch.setattr(finiteness.RowNorms, "of", lambda _, tensors: wide_norms(tensors))
    if request.param == "by what torch documents":
        monkeypatch.setattr(vectors, "_flatten", None)
        monkeypatch.setattr(vectors, "_copy", vectors._copy_each)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("every_n_steps", [1, 2])
@pytest.mark.parametrize("mode", [*MODES, "clipped"])
def test_the_ring_is_that_of_an_independent_recorder(tmp_path: Path, mode: str, every_n_steps: int) -> None:
    settings = {"gradient_clip_val": 1e6} if mode == "clipped" else {}  # which is not reached, but looked for
    module, witness = foreign("automatic" if mode == "clipped" else mode, "adam"), Witness()
    module.spoil = nan_loss
    recorder = FlightRecorder(folder=str(tmp_path), every_n_steps=every_n_steps)
    with pytest.warns(UserWarning, match="Diverged"):
        fit(module, recorder, witness, **settings)
    steps = read(tmp_path)["steps"]
    assert [step["step"] for step in steps] == [0, 1, 2, 3, 4]
    assert [step["batch_index"] for step in steps] == [0, 1, 2, 3, 0]
    for step, (loss, norms, learning_rate) in zip(steps, witness.steps, strict=False):
        assert step["loss"] == pytest.approx(loss, rel=1e-6)
        assert list(step["gradient_norms"].values()) == pytest.approx(norms, rel=1e-5)  # float32, another order
        assert step["learning_rate"] == learning_rate


class Summed(LightningModule):
    """Any network: the loss adds up its outputs; the gradient of its last parameter is scaled, its rate is 0."""

    def __init__(self, net: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.net = net
        parameter = list(net.parameters())[-1]
        if scale != 1.0:
            parameter.register_hook(lambda gradient: gradient * scale)

    def training_step(self, batch: Tensor) -> Tensor:
        output: Tensor = self.net(batch)
        return output.sum() / 1000

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.0)


class DoubleNorms(Callback):
    """Looks for itself: the norms of gradients and of the parameters that moved, in float64, added up one by one."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[float], list[float]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        held = list(pl_module.parameters())
        tensors = (
            [each.grad.to_dense() for each in held if each.grad is not None],
            [each.detach() for each in held if each.grad is not None],
        )
        norms = [[math.sqrt(math.fsum(each.double().square().flatten().tolist())) for each in kind] for kind in tensors]
        self.steps.append((norms[0], norms[1]))


def chain(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))


def frozen(net: nn.Module) -> nn.Module:
    next(net.parameters()).requires_grad_(False)
    return net


def four_batches(net: nn.Module) -> DataLoader[Any]:
    first = next(net.parameters())
    embeds = isinstance(next(net.children()), nn.Embedding)
    rows = torch.tensor([3, 3, 7]) if embeds else torch.randn(3, first.shape[-1]).to(first.dtype)
    return DataLoader([rows] * 4, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


NETS: dict[str, Callable[[], nn.Module]] = {
    "few elements": lambda: chain(3, 2),
    "many small tensors": lambda: chain(20, 12),
    "many, one of them frozen": lambda: frozen(chain(20, 12)),
    "many in float64": lambda: chain(20, 12).double(),
    "many in half precision": lambda: chain(20, 12).bfloat16(),
    "large tensors": lambda: chain(120, 1),
    "a sparse gradient": lambda: nn.Sequential(nn.Embedding(500, 20, sparse=True), chain(20, 4)),
    "a parameter of nothing": lambda: nn.Sequential(nn.Linear(20, 0), nn.Linear(0, 20), chain(20, 8)),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scale", [1.0, 1e25])
def test_norms_of_any_network_are_those_of_double_precision(name: str, scale: float) -> None:
    seed_everything(0, verbose=False)
    net = NETS[name]()
    recorder, witness = FlightRecorder(), DoubleNorms()
    fit(Summed(net, scale), recorder, witness, data=four_batches(net), max_epochs=1)
    steps = recorder.state_dict()["steps"]
    assert len(steps) == len(witness.steps) == 4
    assert not recorder.diverged
    for step, (gradients, parameters) in zip(steps, witness.steps, strict=True):
        assert list(step["gradient_norms"].values()) == pytest.approx(gradients, rel=1e-6)
        assert list(step["parameter_norms"].values()) == pytest.approx(parameters, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_element_that_is_not_finite_is_found_in_any_network(tmp_path: Path, name: str, value: float) -> None:
    net = NETS[name]()
    module = Summed(net)
    steps = iter(range(4))

    def spoil(gradient: Tensor) -> Tensor:
        broken = gradient.clone()
        broken[-1] = value if next(steps) == 2 else broken[-1]
        return broken

    list(net.parameters())[-1].register_hook(spoil)
    with pytest.warns(UserWarning, match=rf"the gradient of net\..*bias became {value} at step 2"):
        fit(module, FlightRecorder(folder=str(tmp_path)), data=four_batches(net), max_epochs=1)
    assert all(bool(torch.isfinite(each).all()) for each in module.parameters())


def test_a_gradient_that_becomes_sparse_is_still_measured() -> None:
    class Sometimes(Summed):
        def training_step(self, batch: Tensor) -> Tensor:
            dense = self.net[0].weight.sum() if self.global_step < 2 else 0.0
            return super().training_step(batch) + dense

    net = nn.Sequential(nn.Embedding(100, 20, sparse=True), chain(20, 12))
    recorder, witness = FlightRecorder(), DoubleNorms()
    fit(Sometimes(net), recorder, witness, data=four_batches(net), max_epochs=1)
    for step, (gradients, _) in zip(recorder.state_dict()["steps"], witness.steps, strict=True):
        assert list(step["gradient_norms"].values()) == pytest.approx(gradients, rel=1e-6)


class Reassigning(SGD):
    """An optimizer that does not write into a parameter's memory but gives it another."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data - group["lr"] * parameter.grad
        return loss


@pytest.mark.parametrize("mode", MODES)
def test_parameters_that_change_their_memory_are_taken_back_too(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda parameters: Reassigning(parameters, lr=0.05))
    module = foreign(mode)
    module.spoil = nan_loss
    _, trainer = stopped(tmp_path, module)
    assert_as_after_five_good_steps(module, trainer)


def test_accumulation_finds_the_micro_batch(tmp_path: Path) -> None:
    module = foreign()
    stopped(tmp_path, module, data=batches(num=8, broken=5), accumulate_grad_batches=4)
    record = read(tmp_path)
    assert (record["step"], record["batch_index"], record["optimizer"]) == (1, 5, None)
    assert record["batch"]["x"]["rows"][2][1] == "nan"
    assert [step["step"] for step in record["steps"]] == [0]
    # The step's loss is the mean over its micro-batches.
    losses, witness = [], foreign()
    for batch in list(batches(num=8))[:4]:
        loss = nn.functional.mse_loss(witness.net(batch["x"]).squeeze(-1), batch["more"][0])
        losses.append(loss.item())
    assert record["steps"][0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_judging_less_often_goes_back_to_the_last_good_copy(tmp_path: Path) -> None:
    module = foreign()
    module.spoil = nan_loss
    with pytest.warns(UserWarning, match="Diverged"):
        fit(module, FlightRecorder(folder=str(tmp_path), every_n_steps=4))
    record = read(tmp_path)
    assert (record["step"], record["restored_to_step"]) == (5, 4)
    assert len(record["steps"]) == 5
    witness = foreign()
    fit(witness, max_steps=4)
    pairs = zip(module.state_dict().values(), witness.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


class Stochastic(LightningModule):
    """One with all that a step may depend on: dropout, batch normalization, an LSTM's list of weights, a schedule."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 8)
        self.net = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.optimizer = OPTIMIZERS[optimizer]

    def loss(self, batch: Any) -> Tensor:
        self.log("inner", 1.0, batch_size=8)
        return nn.functional.mse_loss(self.net(self.memory(batch["x"])[0]).squeeze(-1), batch["more"][0])

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any) -> None:
        self.loss(batch)

    def val_dataloader(self) -> DataLoader[Any]:
        return batches(2)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


BROKEN = 21  # of 40 batches


def state_after(
    mode: flight_recorder.Mode, optimizer: str, folder: Path, *callbacks: Callback, says: str = "", **settings: Any
) -> dict[str, Tensor]:
    """The weights, buffers and optimizer state of a run that diverged at its 22nd step."""
    seed_everything(0, verbose=False)
    module = Stochastic(optimizer)
    settings = {"max_epochs": 1, "gradient_clip_val": 0.5, "data": batches(40, broken=BROKEN)} | settings
    with pytest.warns(UserWarning, match=f"Diverged.*{says}"):
        trainer = fit(module, *callbacks, FlightRecorder(folder=str(folder), mode=mode), **settings)
    assert read(folder)["step"] == BROKEN
    return state(module, trainer)


def assert_block_is_exact(optimizer: str, folder: Path, *callbacks: type[Callback], **settings: Any) -> None:
    block = state_after("block", optimizer, folder, *(make() for make in callbacks), **settings)
    assert read(folder)["restored_to_step"] == BROKEN
    exact = state_after("exact", optimizer, folder, *(make() for make in callbacks), **settings)
    assert block.keys() == exact.keys()
    assert all(torch.equal(block[name], exact[name]) for name in block)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        *((optimizer, {}) for optimizer in OPTIMIZERS),
        ("adam", {"precision": "bf16-mixed"}),
        ("adam", {"gradient_clip_algorithm": "value"}),
        ("momentum", {"val_check_interval": 25}),  # the block is judged when validation begins
    ],
)
def test_a_block_is_repeated_to_the_step_that_diverged(
    tmp_path: Path, optimizer: str, settings: dict[str, Any]
) -> None:
    assert_block_is_exact(optimizer, tmp_path, **settings)


class Draws(Callback):
    """Somebody else who uses the run's random numbers."""

    def on_train_batch_end(self, *_: Any) -> None:
        torch.rand(1)


def test_a_block_that_cannot_be_repeated_goes_back_to_its_beginning_and_says_so(tmp_path: Path) -> None:
    says = "The weights are those before step 16: the steps since came out differently when repeated."
    block = state_after("block", "adam", tmp_path, Draws(), says=says)
    assert read(tmp_path)["restored_to_step"] == 16
    seed_everything(0, verbose=False)
    witness = Stochastic("adam")
    trainer = fit(witness, Draws(), data=batches(40, broken=BROKEN), max_steps=16, gradient_clip_val=0.5)
    wanted = state(witness, trainer)
    assert all(torch.equal(block[name], wanted[name]) for name in wanted)


class Aftermath(Callback):
    """Somebody who changes the weights between two steps, once, and as little as can be."""

    def __init__(self, number: int) -> None:
        self.number = number

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.number:
            weight = pl_module.net[2].bias
            weight.copy_(torch.nextafter(weight, weight + 1))


@pytest.mark.parametrize("number", [18, BROKEN])
def test_a_single_bit_that_is_another_is_seen(tmp_path: Path, number: int) -> None:
    says = "The weights are those before step 16: the steps since came out differently when repeated."
    state_after("block", "adam", tmp_path, Aftermath(number), says=says)
    state_after("exact", "adam", tmp_path, Aftermath(number))


def test_a_step_after_the_end_finds_what_was_repeated(tmp_path: Path) -> None:
    class OneMore(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.optimizers[0].step()

    assert_block_is_exact("adam", tmp_path, OneMore)


class Unfreezes(Callback):
    """Lets the optimizer have a parameter late, as fine-tuning does."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (group,) = trainer.optimizers[0].param_groups
        self.late = group["params"].pop()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 18:
            trainer.optimizers[0].add_param_group({"params": [self.late]})


def test_a_parameter_that_comes_in_mid_block_is_taken_back_too(tmp_path: Path) -> None:
    assert_block_is_exact("adam", tmp_path, Unfreezes)


def test_what_raises_because_of_a_divergence_does_not_hide_it(tmp_path: Path) -> None:
    class Raises(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
            if index == BROKEN + 2:
                raise KeyError("of NaN weights, say")

    seed_everything(0, verbose=False)
    module, recorder = Stochastic("adam"), FlightRecorder(folder=str(tmp_path), mode="block")
    with pytest.warns(UserWarning, match="Diverged"), pytest.raises(KeyError, match="of NaN weights"):
        fit(module, recorder, Raises(), data=batches(40, broken=BROKEN), max_epochs=1)
    assert recorder.diverged
    assert read(tmp_path)["restored_to_step"] == BROKEN
    assert all(bool(torch.isfinite(each).all()) for each in module.state_dict().values())


def test_a_checkpoint_of_lightnings_own_holds_what_was_taken_back(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1)
    state_after("block", "adam", tmp_path, saves, enable_checkpointing=True)
    for file in (tmp_path / "checkpoints").glob("*.ckpt"):
        weights = torch.load(file, weights_only=True)["state_dict"].values()
        assert all(bool(torch.isfinite(each).all()) for each in weights), file.name


def test_repeating_a_block_leaves_no_trace(tmp_path: Path) -> None:
    """Random numbers, modes and settings are as they would be without it."""

    class Last(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.seen = (
                torch.rand(3),
                [each.training for each in pl_module.modules()],
                trainer.optimizers[0].param_groups[0]["lr"],
            )

    found = []
    for kind in (Stochastic, type("Bare", (Stochastic,), {"loss": None, "training_step": Stochastic.loss})):
        seed_everything(0, verbose=False)
        last, recorder = Last(), FlightRecorder(folder=str(tmp_path), mode="block")
        with pytest.warns(UserWarning, match="Diverged"):
            fit(kind("sgd"), recorder, last, data=batches(40, broken=BROKEN), max_epochs=1, limit_val_batches=0)
        found.append((last.seen[0].tolist(), *last.seen[1:], read(tmp_path)["restored_to_step"]))
    assert found[0][:-1] == found[1][:-1]
    assert [each[-1] for each in found] == [BROKEN, 16]


@pytest.mark.parametrize("mode", MODES[:3])  # a raw optimizer leaves `global_step` where it is
@pytest.mark.parametrize("reason", PLANTS)
def test_late_a_run_ends_one_step_later_and_nothing_is_copied(tmp_path: Path, mode: str, reason: str) -> None:
    module = foreign(mode, "momentum")
    module.spoil = PLANTS[reason]
    recorder = FlightRecorder(folder=str(tmp_path / "recorder"), mode="late")
    checkpoints = Checkpoints(str(tmp_path), every_n_steps=1, every_n_seconds=None)
    (tmp_path / "recorder").mkdir()
    with pytest.warns(UserWarning, match=r"Diverged: .* The weights are those after that step; the last checkpoint"):
        fit(module, recorder, checkpoints, enable_checkpointing=True)
    record = read(tmp_path / "recorder")
    assert (record["reason"], record["step"], record["epoch"], record["batch_index"]) == (reason, 5, 1, 1)
    assert record["restored_to_step"] is None
    assert len(record["steps"]) == 5
    assert module.num_batches == 6  # every step is judged before it is saved; and else one later:
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    module = foreign(mode, "momentum")
    module.spoil = PLANTS[reason]
    with pytest.warns(UserWarning, match="Diverged"):
        fit(module, FlightRecorder(folder=str(tmp_path / "recorder"), mode="late"))
    later = read(tmp_path / "recorder")
    assert module.num_batches == 7
    for step in (*record["steps"], *later["steps"]):
        del step["parameter_norms"]  # of what was saved they are known
    assert later | {"parameter_norms": {}} == record | {"parameter_norms": {}}


def test_a_large_model_is_watched_late_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flight_recorder, "SMALL", 20)
    module = foreign()
    module.spoil = nan_loss
    with pytest.warns(UserWarning, match="Diverged"):
        fit(module, FlightRecorder(folder=str(tmp_path)))
    assert module.num_batches == 7
    assert sum("a run that diverges ends one step late ('late')" in each for each in caplog.messages) == 1


def test_what_is_still_unjudged_at_the_end_is_judged(tmp_path: Path) -> None:
    module = foreign()
    module.spoil = nan_loss
    with pytest.warns(UserWarning, match="Diverged"):
        fit(module, FlightRecorder(folder=str(tmp_path), every_n_steps=100))
    assert read(tmp_path)["restored_to_step"] == 4  # where the epoch began: each is judged at its end


@pytest.mark.parametrize("broken", [False, True])
def test_a_step_that_the_scaler_skips_is_no_divergence(tmp_path: Path, broken: bool) -> None:
    class Half(Foreign):
        def training_step(self, batch: Any) -> Tensor:
            loss = super().training_step(batch)
            return loss * math.nan if broken and self.num_batches == 4 else loss

    seed_everything(0, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10_000)
    recorder = FlightRecorder(folder=str(tmp_path))
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    if not broken:
        fit(Half(), recorder, plugins=[plugin], max_epochs=1)
        assert not recorder.diverged
        assert scaler.get_scale() < 2.0**127  # there was something to skip
        return
    with pytest.warns(UserWarning, match="the loss became nan"):
        fit(Half(), recorder, plugins=[plugin], max_epochs=1)


def test_lbfgs_is_taken_back_whole(tmp_path: Path) -> None:
    OPTIMIZERS["lbfgs"] = lambda parameters: LBFGS(parameters, lr=0.1, max_iter=3)
    try:
        module = foreign("automatic", "lbfgs")
        count = iter(range(100))

        def spoil_the_last(gradient: Tensor) -> Tensor:
            return gradient * math.nan if next(count) == 8 else gradient

        module.net[3].bias.register_hook(spoil_the_last)
        before: list[dict[str, Tensor]] = []

        class Keep(Callback):
            def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
                before.append({name: value.clone() for name, value in pl_module.state_dict().items()})

        recorder, _ = stopped(tmp_path, module, Keep())
        assert all(torch.equal(before[-1][name], value) for name, value in module.state_dict().items())
        assert recorder.flight_record is not None
        assert recorder.flight_record.offending.step == len(before) - 1
    finally:
        del OPTIMIZERS["lbfgs"]


class Pair(LightningModule):
    """Two optimizers that take turns within a batch; the second goes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for part, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            optimizer.zero_grad()
            bad = part is self.second and batch_idx == 2
            self.manual_backward(part(batch).square().mean() * (math.nan if bad else 1.0))
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        return [SGD(self.first.parameters(), lr=0.1), Adam(self.second.parameters(), lr=0.2)]


def test_of_two_optimizers_the_one_that_went_wrong_is_taken_back(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = Pair()
    with pytest.warns(UserWarning, match="Diverged"):
        fit(module, FlightRecorder(folder=str(tmp_path)), data=DataLoader(torch.eye(2).repeat(4, 1), batch_size=2))
    record = read(tmp_path)
    assert (record["optimizer"], record["parameter"], record["step"]) == ("Adam", "second.weight", 5)
    assert set(record["gradient_norms"]) == {"second.weight", "second.bias"}
    seed_everything(0, verbose=False)
    witness = Pair()
    for part, optimizer, steps in zip(
        (witness.first, witness.second), witness.configure_optimizers(), (3, 2), strict=True
    ):
        for _ in range(steps):
            optimizer.zero_grad()
            part(torch.eye(2)).square().mean().backward()
            optimizer.step()
    pairs = zip(module.state_dict().values(), witness.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_long_batch_is_cut_to_whole_rows_the_broken_first(tmp_path: Path) -> None:
    recorder = FlightRecorder(folder=str(tmp_path), max_batch_values=7)
    with pytest.warns(UserWarning, match="Diverged"):
        fit(foreign(), recorder, data=batches(broken=0))
    assert read(tmp_path)["batch"]["x"]["row_numbers"] == [0, 2]


def test_a_disk_that_takes_nothing_stops_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    module = foreign()
    module.spoil = nan_loss
    with pytest.warns(UserWarning, match="Diverged"), pytest.warns(UserWarning, match="Cannot write .*_record.json"):
        trainer = fit(module, FlightRecorder(folder=str(tmp_path / "file")))
    assert_as_after_five_good_steps(module, trainer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be a whole number of at least 1, got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1, got 0"),
        ({"mode": "blocks"}, "`mode` must be exact, block, late or null, got 'blocks'"),
        ({"on_divergence": "panic"}, "`on_divergence` must be stop, raise or continue, got 'panic'"),
        ({"diverged_beyond": math.nan}, "`diverged_beyond` must be a number greater than 1, got nan"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlightRecorder(**arguments)
