"""A table that is larger than memory: its numbers in a temporary file, its rows shuffled inside a window."""

import contextlib
import hashlib
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downslope.gradients.least_squares import LeastSquares, least_squares_of
from downslope.tables.batches import Batch, ShuffledOrder
from downslope.tables.columns import Array, Column
from downslope.tables.randomness import Stream, generator
from downslope.tables.standardization import Rows, Units

CHUNK = 2**22  # bytes that are read at once
WINDOW = 16  # chunks whose rows are shuffled with each other


class Store:
    """Rows of numbers as they come: in memory, and where they would take more than a limit in a temporary file.

    There each chunk of rows is put into an order drawn from (seed, chunk), so that any part of it is one by chance.

    Args:
        width: Numbers a row.
        most_bytes: How many are kept in memory.
        seed: Of the order.
    """

    def __init__(self, width: int, most_bytes: float, seed: int) -> None:
        self.width, self.most_bytes, self.seed = width, most_bytes, seed
        self.values, self.num_rows = np.empty((0, width)), 0
        self.file: Any = None
        self.chunk_rows = max(1, CHUNK // (8 * width))
        self.digest = hashlib.sha256()
        self._num_buffered = self._num_chunks = 0

    def add(self, rows: Array) -> None:
        """Takes some more rows."""
        self.num_rows += len(rows)
        if self.file is None and self.num_rows * self.width * 8 > self.most_bytes:
            self.file = tempfile.TemporaryFile(prefix="downslope-")  # noqa: SIM115
            weakref.finalize(self, self.file.close)
        if self._num_buffered + len(rows) > len(self.values):  # grown where it lies: no second copy
            self.values.resize(
                (max(self._num_buffered + len(rows), len(self.values) * 33 // 32), self.width), refcheck=False
            )
        self.values[self._num_buffered : self._num_buffered + len(rows)] = rows
        self._num_buffered += len(rows)
        if self.file and self._num_buffered >= self.chunk_rows:
            self._write(self.chunk_rows)

    def finish(self) -> None:
        """Leaves in `values` all rows, or writes the last."""
        if self.file:
            self._write(1)
            self.file.flush()
        self.values.resize((self._num_buffered, self.width), refcheck=False)

    def _write(self, least: int) -> None:
        start = 0
        while self._num_buffered - start >= least:
            chunk = self.values[start : min(start + self.chunk_rows, self._num_buffered)]
            order = generator(Stream.SPLIT, self.seed, self._num_chunks).permutation(len(chunk))
            content = chunk[order].tobytes()
            self.digest.update(content)
            try:
                self.file.write(content)
            except OSError as error:
                raise OSError(
                    f"`data.path` is larger than memory, and its numbers do not fit into {tempfile.gettempdir()}: "
                    f"{error.strerror}. TMPDIR=… names another folder."
                ) from error
            start, self._num_chunks = start + len(chunk), self._num_chunks + 1
        self.values = self.values[start : self._num_buffered].copy()
        self._num_buffered = len(self.values)


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Some rows of a stored table: pieces of it, (first row, rows) each, and the units of a model."""

    store: Store
    num_features: int
    num_targets: int
    pieces: Sequence[tuple[int, int]]
    units: Units | None = None

    def __len__(self) -> int:
        return sum(count for _, count in self.pieces)

    def read(self, piece: tuple[int, int]) -> Rows:
        """Returns features, target and weight of a piece."""
        (first, count), size, end = piece, self.store.width * 8, self.num_features + self.num_targets
        values = np.frombuffer(os.pread(self.store.file.fileno(), count * size, first * size))
        values = values.reshape(count, self.store.width)
        weight = values[:, end] if self.store.width > end else None
        return values[:, : self.num_features], values[:, self.num_features : end], weight

    def chunks(self) -> Iterator[Rows]:
        """Yields all rows, some at a time."""
        return map(self.read, self.pieces)

    def batch(self, piece: tuple[int, int]) -> tuple[Tensor, ...]:
        """Returns a piece as tensors in the units of the model."""
        assert self.units is not None
        return self.units.apply(*self.read(piece))

    def least_squares(self) -> LeastSquares:
        """Returns the closed form of a line over them."""
        return least_squares_of(lambda: map(self.batch, self.pieces))

    def batches(self, batch_size: int, seed: int | None, rank: int, num_processes: int) -> "StoredBatches":
        """Returns them in batches, shuffled where there is a seed."""
        return StoredBatches(self, batch_size, seed, rank, num_processes)

    def share(self, rank: int, num_processes: int) -> "StoredRows":
        """Returns an equal share for each process, one after the other."""
        num_rows, first, pieces = len(self) // num_processes, 0, []
        start, end = rank * num_rows, (rank + 1) * num_rows
        for place, count in self.pieces:
            skipped = max(0, start - first)
            if (left := min(count, end - first) - skipped) > 0:
                pieces.append((place + skipped, left))
            first += count
        return replace(self, pieces=pieces)


@dataclass(frozen=True, eq=False)
class StoredTable:
    """As `Table`, of rows in a file."""

    name: str
    store: Store
    feature_names: tuple[str, ...]
    target_name: str
    columns: tuple[Column, ...]
    notes: tuple[str, ...]
    num_targets: int

    def __len__(self) -> int:
        return self.store.num_rows

    @property
    def digest(self) -> str:
        """SHA-256 of every cell, in the order of the file, which the seed decides."""
        return f"{self.store.digest.hexdigest()[:12]} in a file"

    def all_rows(self) -> StoredRows:
        """Returns all rows, chunk by chunk."""
        size = self.store.chunk_rows
        pieces = [(first, min(size, len(self) - first)) for first in range(0, len(self), size)]
        return StoredRows(self.store, len(self.feature_names), self.num_targets, pieces)

    def split(self, seed: int, fractions: tuple[float, float]) -> dict[str, StoredRows]:
        """Returns the rows to train on, to validate and to test with: a share of each chunk."""
        whole, pieces = self.all_rows(), dict[str, list[tuple[int, int]]](train=[], val=[], test=[])
        for first, num_rows in whole.pieces:
            counts = [round(num_rows * share) for share in fractions]
            for part, count in zip(pieces, (num_rows - sum(counts), *counts), strict=True):
                pieces[part] += [(first, count)] if count else []
                first += count
        return {part: replace(whole, pieces=found) for part, found in pieces.items()}

    def chunks(self, rows: StoredRows) -> Iterator[Rows]:
        """Yields rows, some at a time."""
        return rows.chunks()

    def part(self, rows: StoredRows, units: Units) -> StoredRows:
        """Returns rows in the units of a model."""
        return replace(rows, units=units)


class StoredBatches:
    """Iterates over batches of a stored table as `Batches` does over one in memory.

    The chunks come in an order drawn from (seed, epoch), and the rows of `WINDOW` of them are shuffled with each other.
    """

    batch_sampler = None  # Lightning looks for it wherever it finds a `sampler`

    def __init__(self, rows: StoredRows, batch_size: int, seed: int | None, rank: int, num_processes: int) -> None:
        self.rows = rows.share(rank, num_processes)
        self.batch_size, self.seed, self.start = batch_size, seed, 0
        self._order = None if seed is None else ShuffledOrder(len(self.rows.pieces), seed)
        if self._order is not None:  # Lightning takes whoever has the attribute for one that shuffles
            self.sampler = self._order

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        skipped, self.start = self.start * self.batch_size, 0
        order = range(len(self.rows.pieces)) if self._order is None else self._order.rows().tolist()
        left: tuple[Tensor, ...] = ()
        for first in range(0, len(order), WINDOW):
            pieces = [self.rows.pieces[place] for place in order[first : first + WINDOW]]
            num_rows = sum(count for _, count in pieces)
            if skipped >= num_rows:
                skipped -= num_rows
                continue
            parts = [self.rows.batch(piece) for piece in pieces]  # one by one: the window's float64 never is in memory
            window = tuple(map(torch.cat, zip(*parts, strict=True)))
            del parts
            if self._order is not None and self.seed is not None:
                key = (self.seed, self._order.epoch, first + 1)
                shuffled = torch.from_numpy(generator(Stream.ORDER, *key).permutation(num_rows))
                window = tuple(each[shuffled] for each in window)
            window = tuple(each[skipped:] for each in window)
            window = tuple(map(torch.cat, zip(left, window, strict=True))) if left else window
            skipped, whole = 0, len(window[0]) // self.batch_size * self.batch_size
            if whole:
                yield from map(Batch, zip(*(each[:whole].split(self.batch_size) for each in window), strict=True))
            left = tuple(each[whole:] for each in window)
        if left and len(left[0]):
            yield Batch(left)


def free_memory() -> float:
    """Returns how many bytes this process may still take: of the machine's, its control groups' and `ulimit`'s."""
    free = [float("inf")]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * float(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError):
        group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip(" /\n"))
        for each in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max", or none
                free.append(float((each / "memory.max").read_text()) - float((each / "memory.current").read_text()))
    with contextlib.suppress(OSError, ImportError):
        import resource

        used = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
                free.append(most - 1024 * float(used[name].split()[0]))
    return max(0.0, min(free))
