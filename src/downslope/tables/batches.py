"""Batches cut out of tensors in memory: the order of the rows is a function of (seed, epoch)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from downslope.tables.randomness import Stream, generator

Batch = tuple[Tensor, Tensor]


class ShuffledOrder:
    """The order of the rows in an epoch: drawn from (seed, epoch), and from nothing else."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next: Lightning calls it on the `sampler` of what it trains on."""
        self.epoch = epoch

    def rows(self) -> Tensor:
        """Returns the row numbers 0 … num_rows − 1 in this epoch's order."""
        return torch.from_numpy(generator(Stream.ORDER, self.seed, self.epoch).permutation(self.num_rows))


class Batches:
    """Iterates over (features, target) in batches, by slicing: no worker, no collation, no copy of the table.

    On a table of 1e6 rows a `DataLoader` over a `TensorDataset` takes 14 to 50 times as long a step.

    Several processes share every batch of batch_size × num_processes rows in equal parts, so that the mean over
    processes is the mean over rows: of the rows beyond the last such batch, fewer than num_processes sit out.

    Args:
        features: One row a sample.
        target: One value a row.
        batch_size: Rows a batch and process; the last batch may hold fewer.
        sampler: The order of the rows; as they stand when None.
        rank: Which process this is.
        num_processes: How many share the rows.

    Attributes:
        start: The batch that the next iteration, and that one alone, begins with: where a killed epoch went on.
    """

    batch_sampler = None  # Lightning looks for it wherever it finds a `sampler`

    def __init__(
        self,
        features: Tensor,
        target: Tensor,
        batch_size: int,
        sampler: ShuffledOrder | None = None,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.features = features
        self.target = target
        self.batch_size = batch_size
        self.sampler = sampler
        self.rank = rank
        self.num_processes = num_processes
        self.start = 0

    @property
    def num_rows(self) -> int:
        """Rows that this process serves in an epoch."""
        return len(self.target) // self.num_processes

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start * self.batch_size, 0
        if self.sampler is None and self.num_processes == 1:
            features, target = self.features[start:], self.target[start:]
            yield from zip(features.split(self.batch_size), target.split(self.batch_size), strict=True)
            return
        order = self.sampler.rows() if self.sampler else torch.arange(len(self.target))
        mine = order[self.rank : self.num_rows * self.num_processes : self.num_processes]
        for rows in mine[start:].split(self.batch_size):
            yield self.features[rows], self.target[rows]
