"""The data of your_task."""

from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset, random_split


class YourTaskData(LightningDataModule):
    """Rows of features and a target as training, validation and test part.

    Args:
        batch_size: Rows a batch.
        seed: Decides which part a row belongs to.
    """

    num_features = 4  # your columns; the model asks for it by this name

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        # Read your own rows here. These are made up: a sum of sines, and noise.
        generator = torch.Generator().manual_seed(self.seed)
        features = torch.randn(1000, self.num_features, generator=generator)
        target = features.sin().sum(dim=1) + 0.1 * torch.randn(1000, generator=generator)
        self.train, self.val, self.test = random_split(TensorDataset(features, target), [0.8, 0.1, 0.1], generator)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        # A generator of its own: else validating would change the order in which training sees its rows.
        return DataLoader(self.val, batch_size=self.batch_size, generator=torch.Generator())

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=self.batch_size)

    predict_dataloader = test_dataloader  # what scripts/predict.py predicts
