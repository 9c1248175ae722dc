"""State files read block by block, so that memory doesn't grow with model or cohort.

A block is a run of at most BLOCK_ELEMENTS elements of one entry: small enough that a float64
accumulator stays in the processor's cache. Files are read with pread into one reused buffer; a
mapped file's pages would count as the server's memory.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from fedrounds.strategies.compressed import (
    CompressedDelta,
    CompressedReader,
    EntryReader,
    OpenFiles,
)
from fedrounds.tensors.codec import Layout
from fedrounds.tensors.compression import restored, uncompressed_key
from fedrounds.types import EntryKind

BLOCK_ELEMENTS = 64 * 1024
# More threads find memory no faster.
_NUM_THREADS = min(4, os.cpu_count() or 1)
_BLOCKS_AT_A_TIME = 8
_ROWS_BYTES = 8 * 1024 * 1024

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StateFile:
    """A state_dict on disk: the global model, or a client's update.

    Its bytes begin at `offset` of the file. The other fields are for updates only. `others` are the
    payload's sections behind the model, by name. `num_examples` is the update's weight in a mean,
    `num_steps` its number of optimizer steps, and `global_loss` the loss of the base on the
    client's examples (None: the server didn't ask for it). `base` is the model that it began with,
    if that isn't the cohort's, and `staleness` the number of rounds by which that model is older.

    A compressed update has a `compressed` delta from `base`, which is then always set; its `layout`
    is that of the state_dict which it is read as. `replaced` entries are
    read from memory, flattened and of the entry's dtype (see fedrounds.strategies.buffers).
    """

    path: Path
    layout: Layout
    offset: int = 0
    others: Mapping[str, "StateFile"] = field(default_factory=dict)
    num_examples: int = 0
    num_steps: int = 0
    global_loss: float | None = None
    base: "StateFile | None" = None
    staleness: int = 0
    compressed: CompressedDelta | None = None
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """The input of aggregation: everything that the next model may depend on.

    `updates` are in client order. `seed` belongs to this attempt at the round, for aggregators that
    draw random numbers. `ties` maps an entry that is the same tensor as an earlier entry to that
    entry's name. `variances` are the running variances of norm layers, which no honest update makes
    negative.
    """

    base: StateFile
    updates: Sequence[StateFile]
    kinds: Mapping[str, EntryKind]
    seed: int = 0
    ties: Mapping[str, str] = field(default_factory=dict)
    variances: Set[str] = frozenset()


@dataclass(frozen=True)
class Block:
    """Elements [begin, begin + count) of the entry `name`, counted in the flattened tensor."""

    name: str
    begin: int
    count: int


@dataclass(frozen=True)
class NextBlock:
    """A block of the next model, and of the server state that belongs to it.

    `values` is [count], in the entry's dtype. `moments` is [count, num_moments], in the server
    state's dtype, or None if the block has none. Both own their memory.
    """

    block: Block
    values: torch.Tensor
    moments: torch.Tensor | None = None


BlockFunction = Callable[[Block], torch.Tensor]
"""Returns the next values of a block, float64 [count]; the next call may overwrite them."""

Aggregator = Callable[[Cohort], Callable[[], BlockFunction]]
"""Prepares the aggregation of a cohort; the returned function is called once in each thread."""


class BlockReader:
    """Owns the memory that blocks are read into; `read` overwrites what it returned before.

    The most recently read files stay open until the reader is deleted.
    """

    def __init__(self) -> None:
        files = OpenFiles()
        self._entries, self._bases = EntryReader(files), EntryReader(files)
        self._compressed = CompressedReader(files)
        self._base_block: tuple[Path, Block] | None = None
        self._base_values = torch.empty(0)

    def read(self, file: StateFile, block: Block) -> torch.Tensor:
        """Return a block of `file` as a 1-dim tensor of the entry's dtype, [block.count].

        Raises:
            StorageDamaged: the file is shorter than its layout, or gone.
        """
        if (values := file.replaced.get(block.name)) is not None:
            return values[block.begin : block.begin + block.count].clone()
        run = {"begin": block.begin, "count": block.count}
        if file.compressed is None:
            return self._entries.read(file.path, file.layout, block.name, offset=file.offset, **run)
        if (whole := uncompressed_key(block.name)) in file.compressed.layout.entries:
            return self._entries.read(file.path, file.compressed.layout, whole, **run)
        delta = self._compressed.read(file.path, file.compressed, block.name, **run)
        return restored(self._read_base(file, block), delta)

    def _read_base(self, file: StateFile, block: Block) -> torch.Tensor:
        """Return a block of an update's base, kept for the next client's update."""
        assert file.base is not None
        if (file.base.path, block) != self._base_block:
            self._base_values = self._bases.read(
                file.base.path,
                file.base.layout,
                block.name,
                begin=block.begin,
                count=block.count,
            )
            self._base_block = (file.base.path, block)
        return self._base_values


class RowReader:
    """Reads one block of many files at once; owns the memory, which the next `read` overwrites."""

    def __init__(self, files: Sequence[StateFile]) -> None:
        self._files = files
        self._reader = BlockReader()
        self._rows = torch.empty(0)

    def read(self, block: Block) -> torch.Tensor:
        """Return [num_files, block.count], of the entry's dtype.

        Raises:
            StorageDamaged: one of the files is shorter than its layout, or gone.
        """
        dtype = self._files[0].layout.entries[block.name].dtype
        num_elements = len(self._files) * block.count
        if self._rows.dtype != dtype or len(self._rows) < num_elements:
            self._rows = torch.empty(num_elements, dtype=dtype)
        rows = self._rows[:num_elements].view(len(self._files), block.count)
        for row, file in zip(rows, self._files, strict=True):
            row.copy_(self._reader.read(file, block))
        return rows


def elements_per_row(num_rows: int) -> int:
    """Return the block length so that one block of each of `num_rows` files fits the budget."""
    return max(1024, min(BLOCK_ELEMENTS, _ROWS_BYTES // (4 * num_rows)))


def blocks_of(layout: Layout, *, max_elements: int | None = None) -> Iterator[Block]:
    """Yield the blocks of all entries in the order of their bytes; empty entries have none."""
    step = min(BLOCK_ELEMENTS, max_elements or BLOCK_ELEMENTS)
    for name, entry in layout.entries.items():
        num_elements = math.prod(entry.shape)
        for begin in range(0, num_elements, step):
            yield Block(name, begin, min(step, num_elements - begin))


def compute_blocks(
    blocks: Iterable[Block],
    begin: Callable[[], Callable[[Block], T]],
    *,
    at_a_time: int = _BLOCKS_AT_A_TIME,
) -> Iterator[T]:
    """Yield the result of every block, in order; several threads compute them.

    Each thread calls `begin` once, to get a function with buffers of its own. Blocks don't depend
    on each other, so the number of threads changes nothing but the time.
    """
    own = threading.local()

    def compute(run: list[Block]) -> list[T]:
        if not hasattr(own, "function"):
            own.function = begin()
        return [own.function(block) for block in run]

    remaining = iter(blocks)
    runs = iter(lambda: list(islice(remaining, at_a_time)), [])
    pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="blocks")
    under_way: deque[Future[list[T]]] = deque()
    try:
        for run in runs:
            under_way.append(pool.submit(compute, run))
            if len(under_way) > 2 * _NUM_THREADS:
                yield from under_way.popleft().result()
        for computed in under_way:
            yield from computed.result()
    finally:
        pool.shutdown(cancel_futures=True)
