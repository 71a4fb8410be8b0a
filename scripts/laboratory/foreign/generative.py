"""Modules that make data: autoencoders, adversaries, flows and diffusion."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from foreign.peer import NUM_FEATURES, Peer, network


class Autoencoder(Peer):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = network(2), network(NUM_FEATURES, inputs=2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.encoder(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return mse_loss(self(batch[0]), batch[0])


class VariationalAutoencoder(Autoencoder):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = network(4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mean, log_variance = self.encoder(batch[0]).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(dim=1).mean()
        loss = mse_loss(self.decoder(code), batch[0]) + 0.1 * divergence
        self.log_dict({"train/divergence": divergence, "train/loss": loss}, on_epoch=True)
        return loss


class Masked(Autoencoder):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mask = torch.rand_like(batch[0]) < 0.5
        return (self(batch[0] * ~mask) - batch[0]).square()[mask].mean()


class Adversaries(Peer):
    """A GAN: manual optimization, two optimizers that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = network(NUM_FEATURES, inputs=2), network()

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(part.parameters()) for part in (self.generator, self.discriminator)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, step in zip(self.optimizers(), (self.generate, self.discriminate), strict=True):
            self.toggle_optimizer(optimizer)
            loss = step(batch[0])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def fake(self, real: Tensor) -> Tensor:
        return self.generator(torch.randn(len(real), 2).type_as(real))

    def generate(self, real: Tensor) -> Tensor:
        judged = self.discriminator(self.fake(real))
        return binary_cross_entropy_with_logits(judged, torch.ones_like(judged))

    def discriminate(self, real: Tensor) -> Tensor:
        judged = self.discriminator(torch.cat([real, self.fake(real).detach()]))
        truth = (torch.arange(len(judged)) < len(real)).to(judged.dtype)[:, None]
        return binary_cross_entropy_with_logits(judged, truth)


class WassersteinAdversaries(Adversaries):
    """With a penalty on the critic's gradient; the generator learns at every third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generating, judging = self.optimizers()
        self.turn(judging, self.judge(batch[0]))
        if batch_idx % 3 == 0:
            self.turn(generating, -self.discriminator(self.fake(batch[0])).mean())

    def turn(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()

    def judge(self, real: Tensor) -> Tensor:
        fake = self.fake(real).detach()
        between = torch.lerp(real, fake, torch.rand(len(real), 1).type_as(real)).requires_grad_()
        (slope,) = torch.autograd.grad(self.discriminator(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return self.discriminator(fake).mean() - self.discriminator(real).mean() + 10 * penalty


class Diffusion(Peer):
    def __init__(self) -> None:
        super().__init__()
        self.net = network(NUM_FEATURES, inputs=NUM_FEATURES + 1)
        self.register_buffer("signal", torch.linspace(0.99, 0.1, 10), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time, noise = torch.randint(10, (len(batch[0]), 1)), torch.randn_like(batch[0])
        noisy = self.signal[time].sqrt() * batch[0] + (1 - self.signal[time]).sqrt() * noise
        return mse_loss(self.net(torch.cat([noisy, time / 10], dim=1).type_as(noisy)), noise)


class Flow(Peer):
    """One coupling layer: maximum likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(NUM_FEATURES, inputs=NUM_FEATURES // 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        kept, moved = batch[0].chunk(2, dim=1)
        shift, scale = self.net(kept).chunk(2, dim=1)
        code = torch.cat([kept, (moved - shift) * (-scale.tanh()).exp()], dim=1)
        return (0.5 * code.square().sum(dim=1) + scale.tanh().sum(dim=1) + math.log(2 * math.pi)).mean()


class EnergyModel(Peer):
    """Samples by Langevin dynamics along its own gradient, and keeps them for the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.samples = torch.zeros(8, NUM_FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        samples = self.samples.type_as(batch[0])
        for _ in range(2):
            samples.requires_grad_()
            (slope,) = torch.autograd.grad(self.net(samples).sum(), samples)
            samples = (samples - 0.1 * slope + 0.05 * torch.randn_like(samples)).detach()
        self.samples = samples
        real, fake = self.net(batch[0]), self.net(samples)
        return real.mean() - fake.mean() + 0.1 * (real.square().mean() + fake.square().mean())


class DeepEquilibrium(Peer):
    """A fixed point found under no_grad, differentiated at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.around = nn.Linear(NUM_FEATURES, 4), nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            state = torch.zeros_like(batch[0])
            for _ in range(3):
                state = (self.inward(state) + batch[0]).tanh()
        return mse_loss(self.around((self.inward(state) + batch[0]).tanh()), batch[1])
