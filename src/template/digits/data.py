"""Handwritten digits as Lightning takes them: images in batches, split by seed.

The table is the test set of E. Alpaydin & C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0, in scikit-learn's copy: one image a row, 64 pixels
from 0 to 16 and the digit.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, random_split

TABLE = Path(__file__).with_name("digits.csv.gz")

Batch = tuple[Tensor, Tensor]  # images (rows, 8, 8) from 0 to 1, and their digits (rows)


class DigitsData(LightningDataModule):
    """Images of handwritten digits as training, validation and test part.

    Args:
        batch_size: Images a batch.
        seed: Decides which part an image belongs to.
    """

    # What conf/model/digits.yaml does not say is taken from here, by the name of the model's argument.
    num_features = 64
    num_classes = 10

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        table = np.loadtxt(TABLE, delimiter=",", dtype=np.uint8)
        images = torch.from_numpy(table[:, :-1]).float().view(-1, 8, 8) / 16
        digits = torch.from_numpy(table[:, -1]).long()
        # A generator of its own: the split depends on the seed, and on nothing that was drawn before.
        generator = torch.Generator().manual_seed(self.seed)
        self.train, self.val, self.test = random_split(TensorDataset(images, digits), [0.8, 0.1, 0.1], generator)

    def train_dataloader(self) -> DataLoader[Any]:
        # Shuffled by the run's own random numbers, whose state a checkpoint keeps: so a resume sees the same batches.
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        # Each loader draws a random number when it begins; from the run's own, validating would change training.
        return DataLoader(self.val, batch_size=self.batch_size, generator=torch.Generator())

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=self.batch_size)

    predict_dataloader = test_dataloader

    def description(self) -> str:
        """Returns what the first line of a run says of its data."""
        return "digits: 1,797 images of 8 × 8, 10 classes"

    def fingerprint(self) -> str:
        """Returns what tells these data from others, on which a run is not resumed."""
        return hashlib.sha256(TABLE.read_bytes()).hexdigest()
