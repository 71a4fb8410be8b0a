"""Batches cut out of tensors in memory: the order of the rows is a function of (seed, epoch)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from downslope.gradients.least_squares import LeastSquares, least_squares
from downslope.tables.randomness import Stream, generator


class Batch(tuple[Tensor, ...]):
    """Features, target and, where there is one, weight."""

    def to(self, device: torch.device | str) -> "Batch":
        """Returns them on a device: what is there already Lightning would look through at every step."""
        if all(each.device == device for each in self):
            return self
        return Batch(each.to(device, non_blocking=torch.device(device).type == "cuda") for each in self)


# For torch.func a batch is the tuple that it is.
register_pytree_node(Batch, lambda batch: ([*batch], None), lambda tensors, _: Batch(tensors))


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


class Part(tuple[Tensor, ...]):
    """Features, target and, where there is one, weight of rows in memory, in the units of the training rows."""

    def least_squares(self) -> LeastSquares:
        """Returns the closed form of a line over them."""
        return least_squares(*self)

    def batches(self, batch_size: int, seed: int | None, rank: int, num_processes: int) -> "Batches":
        """Returns them in batches, shuffled where there is a seed."""
        features, target, *weight = self
        order = None if seed is None else ShuffledOrder(len(target), seed)
        return Batches(features, target, batch_size, order, rank, num_processes, *weight)


class Batches:
    """Iterates over batches of (features, target), or (features, target, weight), by slicing: no worker, no copy.

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
        weight: What each row counts in the loss.

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
        weight: Tensor | None = None,
    ) -> None:
        self.tensors = (features, target) if weight is None else (features, target, weight)
        self.batch_size = batch_size
        self._order = sampler
        if sampler is not None:  # Lightning takes whoever has the attribute for one that shuffles
            self.sampler = sampler
        self.rank = rank
        self.num_processes = num_processes
        self.start = 0

    @property
    def num_rows(self) -> int:
        """Rows that this process serves in an epoch."""
        return len(self.tensors[0]) // self.num_processes

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start * self.batch_size, 0
        if self._order is None and self.num_processes == 1:
            yield from map(Batch, zip(*(each[start:].split(self.batch_size) for each in self.tensors), strict=True))
            return
        order = self._order.rows() if self._order else torch.arange(len(self.tensors[0]))
        mine = order[self.rank : self.num_rows * self.num_processes : self.num_processes]
        for rows in mine[start:].split(self.batch_size):
            yield Batch(each[rows] for each in self.tensors)
