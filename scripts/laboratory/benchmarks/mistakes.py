"""Classic mistakes planted on real networks: is each named, and is any sound run accused?"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR

from benchmarks.networks import NUM_STEPS, TASKS, Course, Network, Task, train
from benchmarks.report import print_report, show_progress
from downslope.callbacks import FlightRecorder
from downslope.verdict import judge

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Mistake:
    """What is done to a network that would train well, and a part of the hint that names it."""

    hint: str
    tasks: tuple[str, ...]
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None
    data: Callable[[Tensor, Tensor], Data] | None = None
    net: Callable[[nn.Module], nn.Module] | None = None
    kind: type[Network] = Network
    optimizer: Callable[..., Optimizer] = field(default=lambda parameters: Adam(parameters, lr=3e-3))
    trainer: dict[str, Any] = field(default_factory=dict)


def sgd(parameters: Any) -> Optimizer:
    """At a rate that suits all of these tasks."""
    return SGD(parameters, lr=0.1)


class NoZeroGrad(Network):
    """The last step's gradient is never forgotten."""

    def optimizer_zero_grad(self, *_: Any) -> None:
        """MISTAKE."""


class Detached(Network):
    """The first layer's output is cut off from it."""

    def loss(self, batch: Any) -> Tensor:
        assert isinstance(self.net, nn.Sequential)
        first, *others = self.net
        return self.criterion(nn.Sequential(*others)(first(batch[0]).detach()), batch[1])


class Summed(Network):
    """Four micro-batches a step, whose gradients are added up."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        losses = [self.loss(part) for part in zip(*(rows.chunk(4) for rows in batch), strict=True)]
        for loss in losses:
            self.manual_backward(loss)
        optimizer.step()
        mean = torch.stack(losses).mean().detach()
        self.losses.append(float(mean))
        if not math.isfinite(self.losses[-1]):
            self.trainer.should_stop = True
        return mean


class NewHead(Network):
    """The last layer is replaced after the optimizer was made."""

    def on_train_start(self) -> None:
        assert isinstance(self.net, nn.Sequential)
        head = self.net[-1]
        assert isinstance(head, nn.Linear)
        self.net[-1] = nn.Linear(head.in_features, head.out_features)


class Ended(Network):
    """The schedule comes to 0 after 30 steps."""

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.net.parameters())
        schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Coarse(Network):
    """Weights of eight binary digits."""

    def configure_optimizers(self) -> Any:
        return Adam(self.net.to(torch.bfloat16).parameters(), lr=1e-4)

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self.net(batch[0].bfloat16()).float(), batch[1])


def _put(value: float) -> Callable[[Tensor, Tensor], Data]:
    def spoil(inputs: Tensor, target: Tensor) -> Data:
        inputs = inputs.clone()
        inputs[777, 2] = value
        return inputs, target

    return spoil


def _shuffled(inputs: Tensor, target: Tensor) -> Data:
    return inputs, target[torch.randperm(len(target), generator=torch.Generator().manual_seed(0))]


def _is_small(inputs: Tensor, target: Tensor) -> Data:
    return inputs, (target < 5).float()


def _eval(net: nn.Module) -> nn.Module:
    for each in net.modules():
        if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d):
            each.train = lambda mode=True, self=each: self  # type: ignore[method-assign]
            each.training = False
    return net


def _dead(net: nn.Module) -> nn.Module:
    first = next(each for each in net.modules() if isinstance(each, nn.Linear | nn.Conv2d))
    assert first.bias is not None
    nn.init.constant_(first.bias, -50.0)
    return net


def _dropping(net: nn.Module) -> nn.Module:
    *layers, head = net.children()
    return nn.Sequential(*layers, nn.Dropout(0.98), head)


def _one_output(net: nn.Module) -> nn.Module:
    return nn.Sequential(net, nn.Linear(10, 1), nn.Flatten(0))


IMAGES = ("MLP", "CNN", "MLP, dropout")
MISTAKES = {
    "softmax before cross-entropy": Mistake(
        "one too many", IMAGES, lambda output, target: functional.cross_entropy(output.softmax(1), target)
    ),
    "sigmoid before BCE with logits": Mistake(
        "one too many",
        ("MLP", "CNN"),
        lambda output, target: functional.binary_cross_entropy_with_logits(output.sigmoid(), target),
        _is_small,
        _one_output,
    ),
    "softmax over the batch": Mistake(
        "over the rows", IMAGES, lambda output, target: functional.nll_loss(output.log_softmax(0), target)
    ),
    "(N, 1) against (N)": Mistake(
        "squeeze", ("regression",), lambda output, target: functional.mse_loss(output[:, None], target)
    ),
    "shuffled targets": Mistake("targets belong", (*IMAGES, "regression", "pooled CNN"), data=_shuffled),
    "batch norm in eval": Mistake("eval mode", ("ResNet", "MLP, dropout"), net=_eval),
    "maximised": Mistake("sign", IMAGES, lambda output, target: -functional.cross_entropy(output, target)),
    "NaN in a row": Mistake("not finite", ("MLP", "CNN", "regression"), data=_put(math.nan)),
    "huge number in a row": Mistake("as large", ("MLP", "CNN"), data=_put(1e20), optimizer=sgd),
    "inputs 0 … 255": Mistake("scaled", ("MLP", "CNN"), data=lambda x, y: (97 * x + 78, y), optimizer=sgd),
    "clipping to 0.001": Mistake("clipping", IMAGES, optimizer=sgd, trainer={"gradient_clip_val": 1e-3}),
    "weight decay 5": Mistake("weight decay", IMAGES, optimizer=lambda p: Adam(p, lr=3e-3, weight_decay=5.0)),
    "weight decay 3, SGD": Mistake("weight decay", ("MLP",), optimizer=lambda p: SGD(p, lr=0.1, weight_decay=3.0)),
    "dropout 0.98": Mistake("tenth", ("MLP",), net=_dropping),
    "head not in the optimizer": Mistake("no optimizer holds", ("MLP", "CNN"), kind=NewHead),
    "schedule at 0 too early": Mistake("schedule", IMAGES, kind=Ended),
    "gradients summed": Mistake("a sum", IMAGES, kind=Summed, optimizer=sgd),
    "bf16 weights": Mistake("half precision", ("MLP", "CNN"), kind=Coarse),
    "no zero_grad": Mistake("zero_grad", ("MLP", "CNN"), kind=NoZeroGrad),
    "detached": Mistake("no gradient reaches", ("MLP",), kind=Detached),
    "dead units": Mistake("exactly zero", ("MLP", "CNN"), net=_dead),
}


def mistakes() -> None:
    """Prints which mistakes are named, which only alarm, and where a hint misleads."""
    torch.set_num_threads(1)
    rows, notes, num_named, num_misled, total = [], [], 0, 0, 0
    for name, mistake in MISTAKES.items():
        named, misled = 0, 0
        for task in mistake.tasks:
            show_progress(f"{name}: {task}")
            verdict = judge(plant(TASKS[task], mistake).seen[-1])
            right = [hint for hint in verdict.hints if mistake.hint in hint]
            named += bool(right)
            misled += not right and (bool(verdict.hints) or "Try" in verdict.sentence)
            if not right or len(verdict.hints) > 1:
                notes.append(f"- {name}, {task}: “{verdict.sentence}”")
        rows.append([name, str(len(mistake.tasks)), str(named), str(misled)])
        num_named, num_misled, total = num_named + named, num_misled + misled, total + len(mistake.tasks)
    show_progress("")
    rows.append(["all", str(total), f"{num_named}, {num_named / total:.0%}", str(num_misled)])
    print_report(["mistake", "planted", "named", "not named, but another hint or a rate"], rows, notes)


def plant(task: Task, mistake: Mistake, num_steps: int = NUM_STEPS) -> Course:
    """Trains a task with a mistake in it."""
    torch.manual_seed(0)
    data = task.data()
    data = mistake.data(*data) if mistake.data else data
    net = task.make()
    module = mistake.kind(
        mistake.net(net) if mistake.net else net, mistake.criterion or task.criterion, mistake.optimizer, False
    )
    with tempfile.TemporaryDirectory() as folder:
        recorder = FlightRecorder(folder=folder, on_divergence="stop")
        return train(module, data, task.batch_size, num_steps, more=[recorder], **mistake.trainer)
