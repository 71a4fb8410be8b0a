"""A recurrent network that is only ever trained."""

import torch
from lightning import LightningModule
from torch import nn


class Forecast(LightningModule):
    def __init__(self, lr: float, hidden_size: int = 8):
        super().__init__()
        self.rnn = nn.GRU(1, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 1)
        self.lr = lr

    def forward(self, past):
        output, _ = self.rnn(past[..., None])
        return self.head(output[:, -1])[:, 0]

    def training_step(self, batch):
        loss = (self(batch["past"]) - batch["next"]).abs().mean()
        self.log("train/error", loss)
        return {"loss": loss}

    def test_step(self, batch):
        self.log("test/error", (self(batch["past"]) - batch["next"]).abs().mean())

    def predict_step(self, batch):
        return self(batch["past"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)
