"""Everything is settled: nothing is left to configure."""

import torch
from lightning import LightningModule
from torch import nn
from torch.nn.functional import mse_loss


class Autoencoder(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh())
        self.decoder = nn.Linear(4, 64)

    def _shared_step(self, batch, stage):
        images, _ = batch
        loss = mse_loss(self.decoder(self.encoder(images)), images.flatten(1))
        self.log(f"{stage}/loss", loss, on_epoch=True, on_step=False)
        return loss

    def training_step(self, batch, batch_idx):
        return self._shared_step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._shared_step(batch, "val")

    def test_step(self, batch, batch_idx):
        self._shared_step(batch, "test")

    def predict_step(self, batch, batch_idx):
        return self.encoder(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]
