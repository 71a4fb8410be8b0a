"""Readings of a sensor, in dictionaries: the next one is to be told from the last eight."""

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset):
    def __init__(self, readings):
        self.readings = readings

    def __len__(self):
        return len(self.readings) - 8

    def __getitem__(self, index):
        return {"past": self.readings[index : index + 8], "next": self.readings[index + 8]}


class ReadingsData(LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        readings = torch.sin(0.4 * torch.arange(88.0))
        self.train, self.held_out = Windows(readings[:56]), Windows(readings[56:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def test_dataloader(self):
        return DataLoader(self.held_out, batch_size=self.batch_size)

    def predict_dataloader(self):
        return self.test_dataloader()
