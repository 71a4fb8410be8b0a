"""One case fitted twice, with all observers and without: what may not differ, and whether the figures are true."""

import contextlib
import inspect
import io
import logging
import math
import random
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from downslope.callbacks import (
    CriticalLearningRate,
    FlightRecorder,
    GradientMonitor,
    LearningRateEffects,
    Pictures,
    Progress,
    SharpnessMonitor,
    VerdictMonitor,
)
from foreign.optimizers import OPTIMIZERS
from foreign.options import OPTIONS
from foreign.peer import Peer

OnDivergence = Literal["stop", "continue"]
COUNTED = ("training_step", "validation_step", "forward", "loss", "configure_optimizers")
INTERNAL = re.compile(
    r"\b(?:KeyError|AttributeError|TypeError|IndexError|NameError|UnboundLocalError|AssertionError|RuntimeError"
    r"|ZeroDivisionError|OverflowError|StopIteration|Cannot write)\b"
)
TOTAL = "gradient_norm/total"
SAME = 1e-5  # relative: observers add in the gradient's own precision, the recorder in float64
SAME_IN_HALF = 1e-2  # of parameters in bfloat16, whose difference is again one
BLOWN_UP = 1e6  # times the first gradient norm: FlightRecorder's own bound for the loss
OF_OBSERVERS = (
    "gradient_norm/",
    "gradient_value/",
    "parameter_value/",
    "update_ratio/",
    "learning_rate/",
    "learning_rate_effect/",
    "curvature/",
)


@dataclass
class Outcome:
    """What a fit leaves behind.

    Attributes:
        state: What has to be equal to the bit, by name.
        calls: Of the module's methods and of `Optimizer.step`, by name.
        error: What ended it.
        curves: What was logged, by tag and step.
        expected: The recorder's figures, by tag and step.
        said: By observers, in the log or as a warning.
        diverged: A FlightRecorder said so.
    """

    state: dict[str, Any] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    error: str | None = None
    curves: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    expected: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    said: list[str] = field(default_factory=list)
    diverged: bool = False

    def blew_up(self) -> bool:
        """Tells whether a FlightRecorder may end it: a gradient was not finite, or grew out of all proportion."""
        norms = [each for tag, each in self.expected.items() if tag.startswith(TOTAL)]
        return any(not value < BLOWN_UP * next(iter(each.values())) for each in norms for value in each.values())


class Curves(Logger):
    """Keeps what is logged in memory."""

    def __init__(self, curves: dict[str, dict[int, float]]) -> None:
        super().__init__()
        self.curves = curves

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.curves[tag][step or 0] = float(value)


class Recorder(Callback):
    """Takes at each optimizer step, in float64, what the observers write of it.

    Plain hooks, in both modes, and nothing of Downslope's. The gradient that arrives is, with automatic optimization,
    that after backward and before Lightning clips; with manual optimization that of the last backward. A step within a
    step is none.

    Args:
        expected: Filled by tag and optimizer step.
        calls: Of torch's step hooks, counted.
    """

    def __init__(self, expected: dict[str, dict[int, float]], calls: Counter[str]) -> None:
        self.expected = expected
        self.calls = calls
        self.arrived: dict[Tensor, Tensor] = {}
        self.start: dict[Tensor, Tensor] = {}
        self.last: dict[int, dict[int, Tensor]] = {}  # each optimizer's last gradient, by parameter
        self.hooked: set[int] = set()
        self.depth: Counter[int] = Counter()
        self.num_steps = 0
        self.trainer: Trainer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer = trainer
        self.hook(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.depth.clear()
        self.hook(trainer, pl_module)

    def hook(self, trainer: Trainer, module: LightningModule) -> None:
        """Listens to what is new, with manual optimization."""
        for tensor in [] if module.automatic_optimization else _held(trainer.optimizers):
            if id(tensor) not in self.hooked and tensor.requires_grad:
                self.hooked.add(id(tensor))
                tensor.register_post_accumulate_grad_hook(self.keep)

    def keep(self, tensor: Tensor) -> None:
        """Copies a gradient."""
        assert tensor.grad is not None
        self.arrived[tensor] = _wide(tensor.grad)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if pl_module.automatic_optimization:
            for tensor in _held([optimizer]):
                self.arrived.pop(tensor, None)
                if tensor.grad is not None:
                    self.keep(tensor)

    # GradientMonitor takes another way where somebody else's callback may change gradients: this one does not.
    on_before_optimizer_step.__module__ = "downslope.recorder"

    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Counts, for every optimizer there is, and keeps where a step begins."""
        self.calls["optimizer.step"] += 1
        self.depth[id(optimizer)] += 1
        if self.depth[id(optimizer)] == 1:
            self.start = {tensor: _wide(tensor) for tensor in _held([optimizer])}

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Notes the figures of a step of the trainer's."""
        self.depth[id(optimizer)] -= 1
        optimizers = self.trainer.optimizers if self.trainer else []
        if self.depth[id(optimizer)] or not any(optimizer is each for each in optimizers):
            return
        name = _name(optimizers, optimizer)
        figures = self.figures(optimizer, name, "" if len(optimizers) == 1 else f"/{name}")
        for tag, value in figures.items():
            self.expected[tag][self.num_steps] = value
        self.num_steps += 1

    def figures(self, optimizer: Optimizer, name: str, suffix: str) -> dict[str, float]:
        """Returns them by tag."""
        assert self.trainer
        named = self.trainer.lightning_module.named_parameters()
        names = {id(each): name.replace("_orig_mod.", "") for name, each in named}
        held = _held([optimizer])
        gradients = {tensor: _wide(tensor.grad) for tensor in held if tensor.grad is not None}
        arrived = {tensor: self.arrived[tensor] for tensor in gradients if tensor in self.arrived}
        changes = {tensor: _wide(tensor) - self.start.get(tensor, _wide(tensor)) for tensor in held}
        for tensor in gradients:
            self.arrived.pop(tensor, None)
        found: dict[str, float] = {}
        if arrived:
            found[TOTAL + suffix] = _norm(arrived.values())
            found[f"gradient_norm/applied{suffix}"] = _norm([gradients[tensor] for tensor in arrived])
            found |= {
                f"gradient_norm/{names[id(each)]}": _norm([g]) for each, g in arrived.items() if id(each) in names
            }
        if not gradients:
            return found
        last, self.last[id(optimizer)] = self.last.get(id(optimizer)), {id(each): g for each, g in gradients.items()}
        length, gradient_norm = _norm(changes.values()), _norm(gradients.values())
        found[f"update_ratio/total{suffix}"] = _ratio(length, _norm(self.start.values()))
        found[f"learning_rate_effect/effective{suffix}"] = _ratio(length, gradient_norm)
        for tensor in gradients:
            if id(tensor) in names and tensor in self.start:
                ratio = _ratio(_norm([changes[tensor]]), _norm([self.start[tensor]]))
                found[f"update_ratio/{names[id(tensor)]}"] = ratio
        several = len(optimizer.param_groups) > 1
        for index, group in enumerate(optimizer.param_groups):
            rate = float("nan") if group.get("lr") is None else float(group["lr"])
            found[f"learning_rate/{name}{f'/{index}' if several else ''}"] = rate
        if last is not None and list(last) == list(map(id, gradients)):
            dot = sum(float((g.conj() * last[id(each)]).sum().real) for each, g in gradients.items())
            cosine = _ratio(dot, gradient_norm * _norm(last.values()))
            found[f"learning_rate_effect/gradient_cosine{suffix}"] = cosine
        return found


def _wide(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64, copy=True)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(each.abs().square().sum()) for each in tensors))


def _ratio(over: float, under: float) -> float:
    return over / under if under else float("nan") if over in (0, float("nan")) else float("inf")


def _held(optimizers: list[Optimizer]) -> list[Tensor]:
    return [each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]]


def _name(optimizers: list[Optimizer], optimizer: Optimizer) -> str:
    alike = [each for each in optimizers if type(each) is type(optimizer)]
    place = [each is optimizer for each in alike].index(True)
    return f"{type(optimizer).__name__}-{place}" if place else type(optimizer).__name__


def observers(
    folder: Path, on_divergence: OnDivergence = "stop", loss: Any = None, progress: bool = True
) -> list[Callback]:
    """Returns all of them at defaults, but often enough to measure in so short a run."""
    return [
        GradientMonitor(every_n_steps=1, histogram_every_n_steps=2),
        LearningRateEffects(every_n_steps=1, descent_ratio_every_n_steps=2, loss=loss),
        CriticalLearningRate(steps=(0, 3, 6), every_n_steps=2, loss=loss),
        SharpnessMonitor(every_n_steps=3, loss=loss),
        VerdictMonitor(every_n_steps=4, window=3),
        Pictures(str(folder / "pictures"), every_n_steps=5, loss=loss),
        FlightRecorder(folder=str(folder), on_divergence=on_divergence),
        *([Progress(every_n_seconds=0.001, line_every_n_seconds=0.001)] if progress else []),
    ]


def fit(kind: type[Peer], optimizer: str, option: str, observed: bool, on_divergence: OnDivergence = "stop") -> Outcome:
    """Fits a module once, from the same seeds whenever it is called."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as name, _listening(outcome.said), _quiet():
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 (the process-wide state that foreign code draws from)
        random.seed(1)
        module = _counted(kind, outcome.calls)()
        module.make_optimizer = OPTIMIZERS[optimizer]
        recorder = Recorder(outcome.expected, outcome.calls)
        watching = observers(Path(name), on_divergence, kind.again, progress=option != "barebones") if observed else []
        handles = [
            register_optimizer_step_pre_hook(recorder.before_step),
            register_optimizer_step_post_hook(recorder.after_step),
        ]
        trainer = None
        try:
            trainer = _trainer(OPTIONS[option](Path(name)), Path(name), outcome, [recorder, *watching])
            trainer.fit(module)
        except Exception as error:
            outcome.error = f"{type(error).__name__}: {error}"
        finally:
            for handle in handles:
                handle.remove()
            torch.use_deterministic_algorithms(False)
        outcome.state = _random_states() | (_state(module, trainer) if trainer else {})
        outcome.diverged = any(isinstance(each, FlightRecorder) and each.diverged for each in watching)
    return outcome


def _trainer(settings: dict[str, Any], folder: Path, outcome: Outcome, callbacks: list[Callback]) -> Trainer:
    plain: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 2,
        "default_root_dir": folder,
    }
    if settings.get("barebones"):
        plain = {name: plain[name] for name in ("max_epochs", "accelerator", "default_root_dir")}
    else:
        extra = settings.pop("logger", [])
        plain["logger"] = [Curves(outcome.curves), *extra] if extra is not False else False
        plain["enable_progress_bar"] = any(isinstance(each, Progress) for each in callbacks)
    return Trainer(**(plain | settings | {"callbacks": [*settings.pop("callbacks", []), *callbacks]}))


def _counted(kind: type[Peer], calls: Counter[str]) -> type[Peer]:
    """The class, whose methods count how often they are called."""

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return method(*arguments, **named)

        return call

    methods = {name: vars(each)[name] for each in reversed(kind.__mro__) for name in COUNTED if name in vars(each)}
    own = {name: method for name, method in methods.items() if getattr(LightningModule, name, None) is not method}
    return type(kind.__name__, (kind,), {name: counting(name, method) for name, method in own.items()})


@contextlib.contextmanager
def _listening(said: list[str]) -> Iterator[None]:
    """Notes what Downslope says in the log or as a warning, and lets the rest go."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, ours, theirs = Handler(logging.WARNING), logging.getLogger("downslope"), logging.getLogger("lightning")
    level, propagate = theirs.level, ours.propagate
    ours.addHandler(handler)
    ours.propagate = False
    levels = {each: each.level for each in (theirs, logging.getLogger("lightning.pytorch"))}
    for each in levels:
        each.setLevel(logging.CRITICAL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            ours.removeHandler(handler)
            ours.propagate = propagate
            for each, level in levels.items():
                each.setLevel(level)
            said += [str(each.message) for each in caught if "downslope" in each.filename]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _random_states() -> dict[str, Any]:
    return {
        "random state: torch": bits(torch.get_rng_state()),
        "random state: NumPy": bits(np.random.get_state()),  # noqa: NPY002
        "random state: Python": random.getstate(),
    }


def _state(module: Peer, trainer: Trainer) -> dict[str, Any]:
    """What has to be equal to the bit: tensors, what hangs on the module otherwise, optimizers, counts."""
    found = {f"weight or buffer: {name}": bits(each) for name, each in module.named_parameters()}
    found |= {f"weight or buffer: {name}": bits(each) for name, each in module.named_buffers()}
    found |= {f"gradient: {name}": bits(each.grad) for name, each in module.named_parameters()}
    for place, part in module.named_modules():
        own = {name: value for name, value in vars(part).items() if not name.startswith("_") and name != "trainer"}
        found |= {f"attribute: {place}.{name}": bits(value) for name, value in own.items()}
    for index, optimizer in enumerate(trainer.optimizers):
        found[f"optimizer {index}"] = bits(optimizer.state_dict())
    found["global_step"] = trainer.global_step
    found["current_epoch"] = trainer.current_epoch
    found["callback_metrics"] = bits(dict(trainer.callback_metrics))
    return found


def bits(value: Any) -> Any:
    """Makes of tensors and what holds them something that == compares to the last bit; of other objects nothing."""
    if isinstance(value, nn.Module):
        return None
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        dense = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
        return (str(value.dtype), tuple(value.shape), dense.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, torch.Generator):
        return bits(value.get_state())
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, Mapping):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, list | tuple) or type(value).__name__ == "deque":
        return [bits(each) for each in value]
    return value if isinstance(value, int | float | str | bool | None) else None


def differences(plain: Outcome, observed: Outcome, kind: type[Peer]) -> list[str]:
    """Returns what observing changed, in words."""
    if plain.error != observed.error:
        return [f"ended by {observed.error!r}, without observers by {plain.error!r}", *_complaints(observed)]
    names = {**plain.state, **observed.state}
    found = [name for name in names if repr(plain.state.get(name)) != repr(observed.state.get(name))]
    found += [
        f"{name} was called {observed.calls[name]} times instead of {plain.calls[name]}"
        for name in sorted({*plain.calls, *observed.calls} - _free(kind))
        if plain.calls[name] != observed.calls[name]
    ]
    own = {tag for tag in {*plain.curves, *observed.curves} if not tag.startswith(OF_OBSERVERS)}
    found += [f"curve {tag}" for tag in sorted(own) if repr(plain.curves.get(tag)) != repr(observed.curves.get(tag))]
    if observed.diverged and not plain.blew_up():
        found.append("FlightRecorder says that it diverged")
    return [*found, *wrong_figures(observed), *_complaints(observed)]


def _free(kind: type[Peer]) -> set[str]:
    """The methods that may be called more often: the module or its user gave leave."""
    loss = getattr(kind, "loss", None)
    required = [
        each
        for each in (inspect.signature(loss).parameters.values() if inspect.isfunction(loss) else ())
        if each.default is each.empty
    ]
    given = kind.again is not None
    free = {"forward", "loss"} if given or len(required) == 2 else set()  # self and the batch
    return free | ({"training_step"} if kind.again == "training_step" else set())


def wrong_figures(observed: Outcome) -> list[str]:
    """Holds every figure that an observer has of the steps against the recorder's."""
    if not any(tag.startswith(TOTAL) for tag in observed.curves):
        return []
    found = []
    is_half = any("bfloat16" in repr(each)[:80] for name, each in observed.state.items() if name.startswith("weight"))
    for tag, expected in observed.expected.items():
        logged = observed.curves.get(tag, {})
        found += [f"{tag} is missing at step {step}" for step in sorted(expected.keys() - logged.keys())]
        found += [f"{tag} at step {step} is of no step" for step in sorted(logged.keys() - expected.keys())]
        found += [
            f"{tag} at step {step} is {logged[step]!r}, should be {expected[step]!r}"
            for step in sorted(expected.keys() & logged.keys())
            if not np.isclose(
                logged[step],
                expected[step],
                rtol=SAME_IN_HALF if is_half else SAME,
                atol=SAME if "cosine" in tag else 1e-12,
                equal_nan=True,
            )
        ]
    return found[:3]


def _complaints(observed: Outcome) -> list[str]:
    return [f"said: {each}" for each in observed.said if INTERNAL.search(each)]
