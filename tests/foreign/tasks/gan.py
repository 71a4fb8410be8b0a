"""A generator against a discriminator: two optimizers, stepped by hand."""

import torch
from lightning import LightningModule
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits


class GAN(LightningModule):
    def __init__(self, latent_dim: int, lr: float, betas: tuple = (0.5, 0.999)):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(1, (1, 8, 8))
        )
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def judged(self, images, real):
        scores = self.discriminator(images)
        return binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))

    def training_step(self, batch, batch_idx):
        images, _ = batch
        opt_g, opt_d = self.optimizers()
        z = torch.randn(len(images), self.hparams.latent_dim, device=self.device)

        self.toggle_optimizer(opt_g)
        g_loss = self.judged(self.generator(z), 1.0)
        self.manual_backward(g_loss)
        opt_g.step()
        opt_g.zero_grad()
        self.untoggle_optimizer(opt_g)

        self.toggle_optimizer(opt_d)
        d_loss = (self.judged(images, 1.0) + self.judged(self.generator(z).detach(), 0.0)) / 2
        self.manual_backward(d_loss)
        opt_d.step()
        opt_d.zero_grad()
        self.untoggle_optimizer(opt_d)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)

    def configure_optimizers(self):
        settings = {"lr": self.hparams.lr, "betas": tuple(self.hparams.betas)}
        opt_g = torch.optim.Adam(self.generator.parameters(), **settings)
        opt_d = torch.optim.Adam(self.discriminator.parameters(), **settings)
        return [opt_g, opt_d], []
