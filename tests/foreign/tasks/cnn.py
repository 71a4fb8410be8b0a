"""A convolutional network under one cycle of the learning rate."""

import torch
from lightning import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.classification import MulticlassAccuracy


class ConvNet(LightningModule):
    def __init__(self, lr: float, channels: int = 4, num_classes: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16 * channels, num_classes))
        self.accuracy = MulticlassAccuracy(num_classes)

    def forward(self, images):
        return self.head(self.features(images))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        scores = self(images)
        self.accuracy(scores, labels)
        self.log("val/loss", F.cross_entropy(scores, labels))
        self.log("val/accuracy", self.accuracy)

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("test/loss", F.cross_entropy(self(images), labels))

    def predict_step(self, batch, batch_idx):
        images, _ = batch
        return self(images).argmax(dim=1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        total_steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams.lr, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
