"""Pictures of bars, upright or lying: kept in a file, read when they are needed."""

from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset, random_split


class ShapesData(LightningDataModule):
    def __init__(self, folder: str = "shapes", batch_size: int = 8):
        super().__init__()
        self.file = Path(folder) / "shapes.pt"
        self.batch_size = batch_size

    def prepare_data(self):
        if self.file.exists():
            return
        generator = torch.Generator().manual_seed(7)
        images = 0.3 * torch.randn(80, 1, 8, 8, generator=generator)
        labels = torch.arange(80) % 2
        for image, label, place in zip(images, labels, torch.randint(8, (80,), generator=generator), strict=True):
            image[0, :, place] += 1.0 - label
            image[0, place, :] += label
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"images": images, "labels": labels}, self.file)

    def setup(self, stage):
        table = torch.load(self.file)
        dataset = TensorDataset(table["images"], table["labels"])
        self.train, self.val, self.test = random_split(dataset, [48, 16, 16], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=self.batch_size)

    def predict_dataloader(self):
        return DataLoader(self.test, batch_size=self.batch_size)
