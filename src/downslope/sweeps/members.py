"""A group of jobs as one fit: the Trainer sees a module whose parameters are those of all members."""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.core.optimizer import _configure_optimizers, _configure_schedulers_automatic_opt
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.types import LRSchedulerConfig
from omegaconf import DictConfig, open_dict, read_write
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from downslope.gradients.least_squares import HasLeastSquares, LeastSquares
from downslope.runs.checkpoints import load_checkpoint
from downslope.runs.console import explain
from downslope.runs.result import Result
from downslope.runs.stored import passes
from downslope.steps.due import is_due
from downslope.sweeps.stacked import CannotStackError, StackedOptimizer, stacked_loss

NUM_CHECKED = 3  # steps in which a member is held against an ordinary run
MOST_DIFFERENT = 1e-4
KEPT_FOR = {"momentum_buffer": "momentum", "grad_avg": "centered"}  # a state of an optimizer, by the setting it is for

Curve = tuple[int, Tensor]  # an optimizer step, and a value for each member: NaN where it had stopped


@dataclass
class Fit:
    """What came of a group, whose parts are still there."""

    members: "Members"
    trainer: Trainer
    checkpoint: dict[str, Any] | None  # that of the fit as a whole, if its jobs keep any
    seconds: float
    critical_learning_rate: float | None  # η_c of the first step, which is the same for all
    line: LeastSquares | None  # the closed form, where the task has one


class Members(LightningModule):
    """Copies of a module that differ in what their optimizers are set to.

    Args:
        member: With `loss(batch)`; automatic optimization; one optimizer over all its parameters.
        settings: Of each member's optimizer, those that differ from `member`'s own.
        clips: Largest gradient norm of each member, or largest element; none clips nothing, nor does 0.
        clips_values: Which of the two.
        every_n_steps: How often the gradient's norm and the rate are kept.
        num_first_steps: After so many steps, which are all kept.

    Attributes:
        curves: What was measured, by tag.
        best: The least validation loss of each member, with `best_weights` and the step in `best_steps`.
        checked: The weights of the member of the least rate after `NUM_CHECKED` steps.
    """

    def __init__(
        self,
        member: Any,
        settings: Sequence[Mapping[str, Any]],
        clips: Sequence[float] = (),
        clips_values: bool = False,
        every_n_steps: int = 50,
        num_first_steps: int = 100,
    ) -> None:
        super().__init__()
        self.member = member
        self.settings, self.clips, self.clips_values = settings, clips, clips_values
        self.every_n_steps, self.num_first_steps = every_n_steps, num_first_steps
        trained = [name for name, each in member.named_parameters() if each.requires_grad]
        self.names, self.num_trained = [*trained, *(name for name, _ in member.named_buffers())], len(trained)
        self.curves: dict[str, list[Curve]] = {}
        self._sums: dict[str, Tensor] = {}  # of the losses times rows, and of the rows
        self.checked: list[Tensor] = []

    def configure_optimizers(self) -> Optimizer:
        """Stacks the parameters, and has the member's own code make an optimizer with a group for each member.

        So settings, defaults and schedules of all members are torch's own.
        """
        num_members = len(self.settings)
        state = [*(each for each in self.member.parameters() if each.requires_grad), *self.member.buffers()]
        stacked = [each.detach().repeat(num_members, *[1] * each.dim()) for each in state]
        self.recipe, self.schedulers = _recipe(self.member, self.settings)
        self.recipe.step()  # without a gradient: a scheduler wants the first step before its own
        self.stack = nn.ParameterList(map(nn.Parameter, stacked[: self.num_trained]))
        self.buffer_stack = stacked[self.num_trained :]
        limits = [each if each > 0 else math.inf for each in self.clips]
        clips = any(each < math.inf for each in limits)
        clip = torch.tensor(limits, dtype=torch.float64, device=self.device) if clips else None
        kind, settings = type(self.recipe), _together(self.recipe.param_groups, self.device)
        self.optimizer = StackedOptimizer(list(self.stack), kind, settings, self.buffer_stack, clip, self.clips_values)
        self.best_weights = [each.clone() for each in self.optimizer.frozen]
        self.best = torch.full((num_members,), math.inf, device=self.device)
        self.best_steps, self.best_epochs = torch.zeros(2, num_members, dtype=torch.long)
        self.stopped_at = torch.full((num_members,), -1, dtype=torch.long)  # the step after which it was frozen
        return self.optimizer

    def _losses(self, weights: Sequence[Tensor], batch: Any) -> Tensor:
        named = dict(zip(self.names, weights, strict=True))
        buffers = {name: named.pop(name) for name in self.names[self.num_trained :]}
        return stacked_loss(self.member, buffers)(named, batch)

    def training_step(self, batch: Any) -> Tensor:
        """Returns the loss of each member that trains."""
        try:
            losses = self._losses([*self.stack, *self.buffer_stack], batch)
        except Exception as error:
            raise CannotStackError(f"{type(self.member).__name__}.loss cannot be stacked: {explain(error)}") from error
        self._rates = [group["lr"] for group in self.recipe.param_groups]
        self._alive = self.optimizer.alive
        self._add("train", losses, batch, self._alive)
        return losses

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """No member's loss depends on another's weights: the gradient of the sum is each one's own."""
        loss.sum().backward()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Is left to the optimizer, member by member."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps what is due, and what has ended."""
        step = self.trainer.global_step - 1
        if is_due(step, self.every_n_steps, self.num_first_steps):
            norms = torch.full((len(self.settings),), torch.nan, dtype=torch.float64, device=self.device)
            norms[self._alive] = self.optimizer.norms
            self._keep("gradient_norm/total", step, norms)
            self._keep(f"learning_rate/{type(self.recipe).__name__}", step, torch.tensor(self._rates))
        if step + 1 == NUM_CHECKED:
            chosen = least_rate(self.settings)
            self.checked = [each[chosen].clone().cpu() for each in self.optimizer.weights()[: self.num_trained]]
        ended = self._alive[torch.isin(self._alive, self.optimizer.alive, invert=True)]
        self.stopped_at[ended.cpu()] = step + 1
        self.trainer.should_stop = not len(self.optimizer.alive)
        self._schedule("step")

    def on_train_epoch_end(self) -> None:
        """Keeps the mean loss of the epoch, and of members that diverged in it that of their part of it."""
        self._end("train")
        self._schedule("epoch")

    def validation_step(self, batch: Any) -> None:
        """Adds a batch to the mean of every member."""
        self._add("val", self._losses(self.optimizer.weights(), batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Keeps the validation loss, and the weights of those that have never been better."""
        losses = self._end("val")
        better = losses < self.best
        self.best = torch.where(better, losses, self.best)
        self.best_steps[better.cpu()] = self.trainer.global_step
        self.best_epochs[better.cpu()] = self.trainer.current_epoch
        for best, each in zip(self.best_weights, self.optimizer.weights(), strict=True):
            best[better] = each[better]

    def test_step(self, batch: Any) -> None:
        """Adds a batch to the mean of every member."""
        self._add("test", self._losses(self.optimizer.weights(), batch), batch)

    def on_test_epoch_end(self) -> None:
        self._end("test")

    def come_home(self) -> None:
        """Brings to the host, when all is done, what Lightning does not know of, and a job's files are made of."""
        optimizer = self.optimizer
        optimizer.frozen = [each.cpu() for each in optimizer.frozen]
        optimizer.alive, optimizer.num_steps = optimizer.alive.cpu(), optimizer.num_steps.cpu()
        self.best_weights, self.best = [each.cpu() for each in self.best_weights], self.best.cpu()

    def _keep(self, tag: str, step: int, values: Tensor) -> None:
        self.curves.setdefault(tag, []).append((step, values.detach().cpu()))

    def _add(self, part: str, losses: Tensor, batch: Any, members: Any = slice(None)) -> None:
        if part not in self._sums:
            self._sums[part] = torch.zeros(2, len(self.settings), dtype=torch.float64, device=self.device)
        rows = extract_batch_size(batch)
        self._sums[part][0, members] += rows * losses.detach().double()
        self._sums[part][1, members] += rows

    def _end(self, part: str) -> Tensor:
        losses, rows = self._sums.pop(part)
        self._keep(f"{part}/loss", self.trainer.global_step, losses / rows)
        means: Tensor = (losses / rows).to(self.best.dtype)
        return means

    def _schedule(self, interval: str) -> None:
        for each in self.schedulers:
            if each.interval == interval:
                each.scheduler.step()  # type: ignore[call-arg]  # no plateau: `_recipe`
                rates = [group["lr"] for group in self.recipe.param_groups]
                told = torch.tensor(rates, dtype=torch.float64, device=self.device)
                self.optimizer.param_groups[0]["lr"] = told

    def state_of(self, index: int, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns a member's share of the last weights, or of the best ones, named as its module's are."""
        stacked = dict(zip(self.names, weights, strict=True))
        own = self.member.state_dict()
        return {name: (stacked[name][index] if name in stacked else each).clone() for name, each in own.items()}

    def optimizer_of(self, index: int) -> dict[str, Any]:
        """Returns the state of a member's optimizer, as torch's own would have it."""
        group = {name: value for name, value in self.recipe.param_groups[index].items() if name != "params"}
        place = int((self.optimizer.alive == index).nonzero()[0, 0])
        states: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self.stack):
            unused = {kept for kept, asked in KEPT_FOR.items() if not group.get(asked)}
            kept = self.optimizer.state[parameter].items()
            state = {name: each[place].clone() for name, each in kept if name not in unused}
            if state and not isinstance(self.recipe, SGD):
                state["step"] = torch.tensor(float(self.optimizer.param_groups[0]["step"]))
            if state:
                states[number] = state
        return {"state": states, "param_groups": [{**group, "params": [*range(len(self.stack))]}]}


def least_rate(settings: Sequence[Mapping[str, Any]]) -> int:
    """Returns which member has the least learning rate: it does not diverge before the others."""
    return min(range(len(settings)), key=lambda index: float(settings[index].get("lr", 0.0)))


def _recipe(member: Any, settings: Sequence[Mapping[str, Any]]) -> tuple[Optimizer, list[LRSchedulerConfig]]:
    """Has the module make its optimizer and scheduler over a group for each member."""
    groups = [{"params": [nn.Parameter(torch.zeros(()))], **each} for each in settings]
    member.parameters = lambda recurse=True: groups
    try:
        optimizers, schedulers, monitor = _configure_optimizers(member.configure_optimizers())
        made = _configure_schedulers_automatic_opt(schedulers, monitor)
    except (TypeError, ValueError, AttributeError) as error:
        raise CannotStackError(
            f"the optimizer does not take a parameter group for each job: {explain(error)}"
        ) from error
    finally:
        del member.parameters
    if len(optimizers) != 1 or len(optimizers[0].param_groups) != len(groups):
        raise CannotStackError(f"{type(member).__name__} makes several optimizers or parameter groups")
    for each in made:
        if each.reduce_on_plateau or each.frequency != 1 or getattr(each.scheduler, "cycle_momentum", False):
            name = type(each.scheduler).__name__
            raise CannotStackError(f"{name} waits for a metric, for several intervals, or changes more than the rate")
    return optimizers[0], made


def _together(groups: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
    """A tensor with a value for each group where they are numbers, and what all share where not."""
    together: dict[str, Any] = {}
    for name in groups[0]:
        values = [group[name] for group in groups]
        if name == "params":
            continue
        if isinstance(values[0], tuple | list):
            columns = torch.tensor(values, dtype=torch.float64, device=device)
            together[name] = tuple(columns.T)
        elif type(values[0]) in (int, float):
            together[name] = torch.tensor(values, dtype=torch.float64, device=device)
        elif any(value != values[0] for value in values):
            raise CannotStackError(f"the optimizer's {name} differs from job to job")
        else:
            together[name] = values[0]
    return together


def of_member(state: Any, index: int) -> Any:
    """Returns a scheduler's state for the one group of a member's own optimizer."""
    if isinstance(state, dict):
        lists = ("base_lrs", "_last_lr", "min_lrs", "lr_lambdas")
        return {
            name: [value[index]] if name in lists and isinstance(value, list) else of_member(value, index)
            for name, value in state.items()
        }
    return [of_member(each, index) for each in state] if isinstance(state, list) else state


def train_members(config: DictConfig, build: Callable[[DictConfig], Any], members: Mapping[str, Any]) -> Fit:
    """Trains all members by one fit, after holding one of them against an ordinary run of a few steps.

    Args:
        config: Of the first member.
        build: Makes data, module and Trainer out of a configuration.
        members: What `Members` takes beside the module.

    Raises:
        CannotStackError: They cannot be trained at once, or would not be trained as an ordinary run is.
    """
    expected, critical = _ordinary(config, build, members)
    with tempfile.TemporaryDirectory() as folder:
        quiet = _quiet(config, "Checkpoints", folder=folder, every_n_seconds=None, every_n_steps=None)
        data, module, trainer = build(quiet)
        stack = Members(module, **members)
        started = time.perf_counter()
        trainer.fit(stack, datamodule=data)
        seconds = time.perf_counter() - started
        last = Path(folder) / "last.ckpt"
        checkpoint = load_checkpoint(last) if last.is_file() else None
    for found, each in zip(stack.checked, expected, strict=False):  # a shorter run is not checked
        worst = float((found - each.cpu()).abs().max() / each.abs().max().clamp(min=1e-12))
        if not worst <= MOST_DIFFERENT:
            raise CannotStackError(
                f"after {NUM_CHECKED} steps the weights differ by {worst:.1e} from those of an ordinary run: "
                f"does the training_step of {type(module).__name__} do more than its loss says?"
            )
    ended_at = trainer.global_step
    line = module.least_squares() if isinstance(module, HasLeastSquares) else None
    if not stack.curves.get("val/loss") or stack.curves["val/loss"][-1][0] != ended_at:
        trainer.validate(stack, datamodule=data, verbose=False)
    if any(passes(data, module, trainer, ["test"])):
        trainer.test(stack, datamodule=data, verbose=False)
    stack.come_home()
    return Fit(stack, trainer, checkpoint, seconds, critical, line)


def num_parameters(config: DictConfig, build: Callable[[DictConfig], Any]) -> int:
    """Returns how many numbers a member trains.

    Raises:
        Exception: What is wrong with the configuration of all.
    """
    _, module, _ = build(_quiet(config, "no callback"))
    return sum(each.numel() for each in module.parameters() if each.requires_grad)


def _quiet(config: DictConfig, kept: str, **settings: Any) -> DictConfig:
    """The configuration without loggers and bars, and of the callbacks that class alone."""
    quiet = config.copy()
    with open_dict(quiet), read_write(quiet):
        nodes = {name: node for name, node in config.callbacks.items() if str(node._target_).endswith(f".{kept}")}
        quiet.callbacks, quiet.logger = nodes, {}
        for node in quiet.callbacks.values():
            node.update(settings)
        quiet.trainer.update({"enable_progress_bar": False, "enable_model_summary": False})
        if not nodes:
            quiet.trainer.enable_checkpointing = False
    return quiet


def _ordinary(
    config: DictConfig, build: Callable[[DictConfig], Any], members: Mapping[str, Any]
) -> tuple[list[Tensor], float | None]:
    """Trains the member of the least rate a few steps, as any run; returns its weights, and the first step's η_c."""
    chosen = least_rate(members["settings"])
    quiet = _quiet(config, "CriticalLearningRate")
    with open_dict(quiet), read_write(quiet):
        quiet.optimizer.update(members["settings"][chosen])
        quiet.trainer.gradient_clip_val = members["clips"][chosen] or None
    data, module, trainer = build(quiet)
    _check_parts(module, trainer)

    def stop(trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= NUM_CHECKED  # with max_steps a schedule would end there

    trainer.callbacks.append(LambdaCallback(on_train_batch_end=stop))
    trainer.fit(module, datamodule=data)
    weights = [each.detach().clone() for each in module.parameters() if each.requires_grad]
    trainer.validate(module, datamodule=data, verbose=False)
    _check_validation_loss(trainer, module)
    result = Result(status="completed")
    for callback in trainer.callbacks:
        if hasattr(callback, "add_to"):
            callback.add_to(result)
    return weights, result.critical_learning_rate


def _check_parts(module: Any, trainer: Trainer) -> None:
    """Raises for what trains otherwise than by one step a batch, in float32, in this process."""
    if not module.automatic_optimization:
        raise CannotStackError(f"{type(module).__name__} takes its optimizer steps itself")
    if not hasattr(module, "loss"):
        raise CannotStackError(f"{type(module).__name__} has no `loss(batch)`")
    usual = {"accumulate_grad_batches": trainer.accumulate_grad_batches == 1,
             "precision": trainer.precision == "32-true",
             "strategy": isinstance(trainer.strategy, SingleDeviceStrategy)}  # fmt: skip
    if odd := [f"trainer.{name}" for name, is_usual in usual.items() if not is_usual]:
        raise CannotStackError(f"the vectorized launcher does not support {', '.join(odd)}")


def _check_validation_loss(trainer: Trainer, module: Any) -> None:
    """Raises where what the module logs as `val/loss` is not the mean of its `loss` over the rows."""
    total = rows = 0.0
    module.eval()
    with torch.no_grad():
        for batch in trainer.val_dataloaders or ():
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            total += extract_batch_size(batch) * float(module.loss(batch))
            rows += extract_batch_size(batch)
    logged = trainer.callback_metrics.get("val/loss")
    if logged is None or not rows or not math.isclose(float(logged), total / rows, rel_tol=1e-4):
        raise CannotStackError(f"{type(module).__name__} does not log a `val/loss` that is the mean of its loss")
