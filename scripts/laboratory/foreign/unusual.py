"""Unusual parameters, and unusual ways to optimize them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

from foreign.peer import NUM_FEATURES, Peer, network
from foreign.supervised import Regressor


class ComplexParameters(Peer):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.ones(3, dtype=torch.complex64) + 0.5j)
        self.head = nn.Linear(NUM_FEATURES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        frequencies = torch.fft.rfft(batch[0].float()) * self.spectrum.to(torch.complex64)
        filtered = torch.fft.irfft(frequencies, n=NUM_FEATURES)
        return mse_loss(self.head(filtered.to(self.head.weight.dtype)), batch[1])


class DoubleParameters(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.net.double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([each.double() for each in batch], batch_idx)


class BrainFloatParameters(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.net.bfloat16()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([each.to(self.net[0].weight.dtype) for each in batch], batch_idx)


class MixedParameters(Regressor):
    """Layers of several precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs).to(self.head.weight.dtype)).type_as(inputs)


class TiedWeights(Regressor):
    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(NUM_FEATURES, NUM_FEATURES), nn.Linear(NUM_FEATURES, NUM_FEATURES)
        second.weight = first.weight
        self.net = nn.Sequential(first, nn.Tanh(), second, nn.Linear(NUM_FEATURES, 1))


class WeightNormalized(Regressor):
    def __init__(self) -> None:
        super().__init__()
        weight_norm(self.net[0])


class OldWeightNorm(Regressor):
    """A hook writes the weight as a plain attribute before each forward."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.weight_norm(self.net[0])


class SpectrallyNormalized(Regressor):
    """A power iteration moves buffers in each forward."""

    def __init__(self) -> None:
        super().__init__()
        spectral_norm(self.net[0])


class Orthogonal(Regressor):
    def __init__(self) -> None:
        super().__init__()
        orthogonal(self.net[0])


class LowRank(Regressor):
    """LoRA: frozen weights and a small change of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.down, self.up = nn.Linear(NUM_FEATURES, 2, bias=False), nn.Linear(2, 6, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net[2](self.net[1](self.net[0](inputs) + self.up(self.down(inputs))))


class HeadOnly(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net[2].parameters())


class FrozenTeacher(Regressor):
    """Distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).eval().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mse_loss(self(batch[0]), self.teacher(batch[0])) + super().training_step(batch, batch_idx)


class FrozenInfinities(Regressor):
    """A mask kept as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.tensor([0.0, float("-inf")]), requires_grad=False)


class EmptyAndUnused(Regressor):
    """A parameter without elements, a scalar one, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing, self.unused = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs) * self.scale + self.nothing.sum()


class HoldsOutsideTensors(Regressor):
    """The optimizer steps tensors that the module does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = [torch.ones(NUM_FEATURES, requires_grad=True)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([batch[0] * self.outside[0].to(batch[0].dtype), batch[1]], batch_idx)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([*self.parameters(), *self.outside])


class NoOptimizer(Regressor):
    def configure_optimizers(self) -> None:
        return None


class ManyGroups(Regressor):
    def configure_optimizers(self) -> Any:
        weights = [each for each in self.parameters() if each.dim() > 1]
        biases = [each for each in self.parameters() if each.dim() <= 1]
        return self.make_optimizer([{"params": weights}, {"params": biases, "weight_decay": 0.0}])


class NoRate(Regressor):
    """As Adafactor in transformers: a group's rate is None, and the optimizer finds its own."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        step, rates = optimizer.step, [group.get("lr") for group in optimizer.param_groups]

        def with_own_rate(closure: Any = None) -> Any:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            try:
                return step(closure)
            finally:
                for group in optimizer.param_groups:
                    group["lr"] = None

        for group in optimizer.param_groups:
            group["lr"] = None
        optimizer.step = with_own_rate
        return optimizer


class ScheduledByStep(Regressor):
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        scheduler = CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ScheduledByPlateau(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer, patience=0), "monitor": "train/loss"},
        }


class ScheduledList(Regressor):
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [StepLR(optimizer, 1, 0.5)]


class ClipsItself(Regressor):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class CleansGradients(Regressor):
    """Deals with NaN gradients itself, in the hook made for it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step == 3 else 1.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0)


class NoisyGradients(Regressor):
    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(0.01 * torch.randn_like(parameter.grad))


class WarmsUp(Regressor):
    """By the hook around the step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)


class DifferentiatesItself(Regressor):
    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        loss.backward(inputs=[each for each in self.parameters() if each.requires_grad])


class Manual(Regressor):
    """Accumulates and clips by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return loss


class ManualByClosure(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class ManualAndRaw(Manual):
    """torch's own optimizer and backward: Lightning sees neither."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        loss = mse_loss(self(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class ManualSharpnessAware(Manual):
    """Climbs along the gradient, differentiates there, and steps from where it was."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(mse_loss(self(batch[0]), batch[1]))
        climbed = [0.05 * each.grad.sign() for each in self.parameters() if each.grad is not None]
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, climb in zip(self.parameters(), climbed, strict=True):
                    parameter.add_(climb, alpha=sign)
            if sign == 1:
                optimizer.zero_grad()
                self.manual_backward(mse_loss(self(batch[0]), batch[1]))
        optimizer.step()


class TwoWithFrequencies(Manual):
    """Two optimizers of one module, one of which steps at every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.other = network()

    def configure_optimizers(self) -> Any:
        first, second = self.make_optimizer(self.net.parameters()), self.make_optimizer(self.other.parameters())
        return {"optimizer": first, "frequency": 1}, {"optimizer": second, "frequency": 3}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, part, every in zip(self.optimizers(), (self.net, self.other), (1, 3), strict=True):
            if batch_idx % every == 0:
                optimizer.zero_grad()
                self.manual_backward(mse_loss(part(batch[0]), batch[1]))
                optimizer.step()
