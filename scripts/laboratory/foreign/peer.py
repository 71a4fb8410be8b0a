"""What all modules of the matrix share: small data, something to monitor, and the optimizer that is asked for."""

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset

NUM_SAMPLES = 48  # six batches of eight
NUM_FEATURES = 4
NUM_CLASSES = 3
NUM_TOKENS = 11

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]


def imports(*names: str) -> bool:
    """Tells whether public libraries are installed and can be imported; one that cannot is named, and left out."""
    if not all(map(find_spec, names)):
        return False
    try:
        for name in names:
            import_module(name)
    except Exception as error:
        print(f"{' and '.join(names)} cannot be imported: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return False
    return True


def _numbers(*shape: int) -> Tensor:
    """The same numbers in every process, drawn from no generator that a module draws from."""
    return torch.randn(NUM_SAMPLES, *shape, generator=torch.Generator().manual_seed(7))


def rows() -> TensorDataset:
    """Inputs and a target of one column, nearly linear."""
    inputs = _numbers(NUM_FEATURES)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True).tanh())


def labelled() -> TensorDataset:
    """Inputs and a class."""
    inputs = _numbers(NUM_FEATURES)
    return TensorDataset(inputs, inputs[:, :NUM_CLASSES].argmax(dim=1))


def images() -> TensorDataset:
    """Images of one channel and 8 by 8 pixels, and a class."""
    pixels = _numbers(1, 8, 8)
    return TensorDataset(pixels, pixels[:, 0, 0, :NUM_CLASSES].argmax(dim=1))


def tokens() -> TensorDataset:
    """Sequences of seven tokens."""
    return TensorDataset((_numbers(7) * 4).long().abs() % NUM_TOKENS)


class Dictionaries(Dataset[dict[str, Tensor]]):
    """Rows as libraries for language give them: a dictionary a sample."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, labels = labelled()[index]
        return {"inputs": inputs, "labels": labels}


def network(outputs: int = 1, inputs: int = NUM_FEATURES, hidden: int = 6) -> nn.Sequential:
    """A network of one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


class Peer(LightningModule):
    """Base of the modules.

    Attributes:
        data: Makes the data.
        make_optimizer: Set by the matrix.
        again: What is given to the observers as `loss=`.
        raises: Its training ends with an exception on purpose.
    """

    data: Callable[[], Dataset[Any]] = staticmethod(rows)
    make_optimizer: MakeOptimizer
    again: ClassVar[Any] = None
    raises = False

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(self.data(), batch_size=8, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.data(), batch_size=16)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", sum(each.detach().abs().float().mean() for each in self.parameters()))
