"""Two layers, and an Adam of their own."""

import torch
from lightning import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy


class Classifier(LightningModule):
    def __init__(self, num_hidden: int = 16, lr: float = 1e-3):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, num_hidden), nn.ReLU(), nn.Linear(num_hidden, 2))
        self.loss = nn.CrossEntropyLoss()
        self.lr = lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss(self.layers(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log_dict(
            {"val/loss": cross_entropy(self.layers(x), y), "val/error": (self.layers(x).argmax(1) != y).float().mean()}
        )

    def predict_step(self, batch, batch_idx):
        chances = self.layers(batch[0]).softmax(dim=1)
        return {"label": batch[1], "upright": chances[:, 0], "lying": chances[:, 1]}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)
