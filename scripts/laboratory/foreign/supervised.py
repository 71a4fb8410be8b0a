"""Classifiers and regressors, and the many ways to hand a loss to Lightning."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, triplet_margin_loss
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from foreign.peer import NUM_CLASSES, NUM_FEATURES, Dictionaries, Peer, images, labelled, network


class LinearRegressor(Peer):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(NUM_FEATURES, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mse_loss(self(batch[0]), batch[1])


class Regressor(Peer):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mse_loss(self(batch[0]), batch[1])


class LogisticRegressor(LinearRegressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return binary_cross_entropy_with_logits(self(batch[0]), (batch[1] > 0).to(batch[0].dtype))


class Classifier(Peer):
    data = staticmethod(labelled)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(network(8), nn.Dropout(0.3), nn.Linear(8, NUM_CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = cross_entropy(logits, batch[1])
        self.log_dict({"train/loss": loss, "train/accuracy": (logits.argmax(1) == batch[1]).float().mean()})
        return loss


class ConvolutionalNetwork(Classifier):
    data = staticmethod(images)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, NUM_CLASSES)
        )


class ResidualNetwork(Classifier):
    data = staticmethod(images)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, NUM_CLASSES)
        self.net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

    def forward(self, inputs: Tensor) -> Tensor:
        stem = self.stem(inputs)
        return self.head((stem + self.net(stem)).relu().mean(dim=(2, 3)))


class GroupNormalized(Classifier):
    data = staticmethod(images)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.LazyLinear(NUM_CLASSES)
        )
        self.net(torch.zeros(1, 1, 8, 8))  # gives the lazy layer its size


class Checkpointed(Classifier):
    """Activations are computed again in the backward pass."""

    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.net, inputs, use_reentrant=False)


class Compiled(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(network(NUM_CLASSES), backend="eager")


class MultiTask(Peer):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = network(6)
        self.heads = nn.ModuleDict({"value": nn.Linear(6, 1), "sign": nn.Linear(6, 1)})
        self.log_variances = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = self.trunk(batch[0])
        value = mse_loss(self.heads["value"](features), batch[1])
        sign = binary_cross_entropy_with_logits(self.heads["sign"](features), (batch[1] > 0).to(batch[1].dtype))
        loss = (torch.stack([value, sign]) * (-self.log_variances).exp() + self.log_variances).sum()
        return {"loss": loss, "value": value.detach(), "sign": sign.detach()}


class MetricLearner(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        embedded = self.net[0](batch[0])
        return triplet_margin_loss(embedded, embedded.roll(1, 0), embedded.roll(2, 0))


class AlternatingHeads(Peer):
    """Only one head gets a gradient at a step."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(network() for _ in range(2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mse_loss(self.heads[batch_idx % 2](batch[0]), batch[1])


class StochasticDepth(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(network(NUM_FEATURES) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            if torch.rand(()) < 0.6:
                inputs = inputs + block(inputs)
        return self.net(inputs)


class MixtureOfExperts(Classifier):
    """Experts that no sample is sent to get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(NUM_FEATURES, 4)
        self.experts = nn.ModuleList(network(NUM_CLASSES) for _ in range(4))

    def forward(self, inputs: Tensor) -> Tensor:
        weights, chosen = self.net(inputs).softmax(dim=1).max(dim=1)
        output = inputs.new_zeros(len(inputs), NUM_CLASSES)
        for index, expert in enumerate(self.experts):
            if (mask := chosen == index).any():
                output = output.index_add(0, mask.nonzero()[:, 0], expert(inputs[mask]) * weights[mask, None])
        return output


class MixUp(Classifier):
    """Draws from NumPy and torch in each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        share, order = float(np.random.beta(0.4, 0.4)), torch.randperm(len(inputs))  # noqa: NPY002 (as people write it)
        logits = self(share * inputs + (1 - share) * inputs[order])
        return share * cross_entropy(logits, labels) + (1 - share) * cross_entropy(logits, labels[order])


class CriterionCalledLoss(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self(batch[0]), batch[1])


class LossOfPredictions(Regressor):
    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(predictions, targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self(batch[0]), batch[1])


class LossOfBatch(Regressor):
    def loss(self, batch: Any) -> Tensor:
        return mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class LossOfBatchWithDefault(Regressor):
    def loss(self, batch: Any, weight: float = 0.5) -> Tensor:
        return weight * mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class LossWithBatchNorm(LossOfBatch):
    """Buffers move, and random numbers are drawn, in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(NUM_FEATURES, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 1)
        )


class LossThatLogs(LossOfBatch):
    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss


class LossThatCounts(LossOfBatch):
    """Breaks its promise: it has consequences."""

    num_losses = 0

    def loss(self, batch: Any) -> Tensor:
        self.num_losses += 1
        return super().loss(batch) * min(1.0, self.num_losses / 5)


class LossThatPops(Classifier):
    data = staticmethod(Dictionaries)

    def loss(self, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        return cross_entropy(self(batch["inputs"]), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class LossInAutograd(LossOfBatch):
    """A penalty on the slope: the loss differentiates by itself."""

    def loss(self, batch: Any) -> Tensor:
        with torch.enable_grad():
            inputs = batch[0].detach().requires_grad_()
            (slope,) = torch.autograd.grad(self(inputs).sum(), inputs, create_graph=True)
        return mse_loss(self(batch[0]), batch[1]) + 0.1 * slope.square().mean()


class VouchedStep(Regressor):
    again = "training_step"


class VouchedFunction(Regressor):
    @staticmethod
    def again(module: Any, batch: Any) -> Tensor:
        return mse_loss(module(batch[0]), batch[1])


class LogsEverything(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean(loss.detach())
        self.log("metric", self.mean, on_step=True, on_epoch=True)
        for name, parameter in self.named_parameters():
            self.log(f"norm/{name}", parameter.detach().norm(), on_step=True, on_epoch=True)
        return loss


class SometimesNone(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class LossOfShapeOne(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx).reshape(1)


class Pops(Classifier):
    data = staticmethod(Dictionaries)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = batch.pop("labels")
        return cross_entropy(self(**batch), labels)


class TakesAnIterator(Regressor):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class ChangesTheBatch(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].add_(0.1 * torch.randn_like(batch[0]))
        return super().training_step(batch, batch_idx)


class WarmsUpTheLoss(Regressor):
    """The loss begins at almost 0."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * min(1.0, 1e-9 + self.global_step / 5)


class Raises(Regressor):
    raises = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4:
            raise LookupError("as it happens")
        return super().training_step(batch, batch_idx)


class Interrupted(Regressor):
    again = None  # even where all others are vouched for: what it does to the Trainer is a consequence

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trainer.should_stop = self.global_step >= 3
        return super().training_step(batch, batch_idx)
