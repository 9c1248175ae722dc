"""State files read block by block, so that memory doesn't grow with model or cohort.

A block is a run of at most BLOCK_ELEMENTS elements of one entry: small enough that a float64
accumulator stays in the processor's cache. Files are read with pread into one reused buffer; a
mapped file's pages would count as the server's memory.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from shared.codec import Layout
from shared.errors import StorageDamaged
from shared.weights import EntryKind

BLOCK_ELEMENTS = 64 * 1024
# More threads find memory no faster.
_NUM_THREADS = min(4, os.cpu_count() or 1)
_BLOCKS_AT_A_TIME = 8


@dataclass(frozen=True, kw_only=True)
class StateFile:
    """A state_dict on disk: the global model, or a client's update.

    `num_examples` is the update's weight in a mean; the global model has none.
    """

    path: Path
    layout: Layout
    num_examples: int = 0


@dataclass(frozen=True)
class Block:
    """Elements [begin, begin + count) of the entry `name`, counted in the flattened tensor."""

    name: str
    begin: int
    count: int


Aggregator = Callable[
    [StateFile, Sequence[StateFile], Mapping[str, EntryKind]],
    Iterator[tuple[Block, torch.Tensor]],
]
"""(base, updates in client order, kinds) -> every block of the next model with its values.

Blocks come in the order of the base's bytes; a block's tensor is 1-dim, of the entry's dtype, and
valid until the next block is asked for.
"""

BlockFunction = Callable[[Block], torch.Tensor]
"""A block of the next model; the tensor is its own, not a view of a buffer used again."""


class BlockReader:
    """Owns the buffer that blocks are read into; `read` overwrites what it returned before."""

    def __init__(self) -> None:
        self._buffer = bytearray(BLOCK_ELEMENTS * 8)

    def read(self, file: StateFile, block: Block) -> torch.Tensor:
        """Return a block of `file` as a 1-dim tensor of the entry's dtype, [block.count].

        Raises:
            StorageDamaged: the file is shorter than its layout, or gone.
        """
        entry = file.layout.entries[block.name]
        size = entry.dtype.itemsize
        view = memoryview(self._buffer)[: block.count * size]
        try:
            descriptor = os.open(file.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise StorageDamaged(f"{file.path} is gone; restore it from a copy") from error
        try:
            count = os.preadv(descriptor, [view], entry.begin + block.begin * size)
        finally:
            os.close(descriptor)
        if count != len(view):
            raise StorageDamaged(
                f"{file.path} ends inside tensor {block.name!r}; restore it from a copy"
            )
        return torch.frombuffer(self._buffer, dtype=entry.dtype, count=block.count)


def blocks_of(layout: Layout) -> Iterator[Block]:
    """Yield the blocks of all entries in the order of their bytes; empty entries have none."""
    for name, entry in layout.entries.items():
        num_elements = math.prod(entry.shape)
        for begin in range(0, num_elements, BLOCK_ELEMENTS):
            yield Block(name, begin, min(BLOCK_ELEMENTS, num_elements - begin))


def compute_blocks(
    layout: Layout, begin: Callable[[], BlockFunction]
) -> Iterator[tuple[Block, torch.Tensor]]:
    """Yield every block of `layout` with its values, computed side by side, in order.

    Each thread calls `begin` once, for a function with buffers of its own. Blocks don't depend on
    each other, so the threads change nothing but the time.
    """
    own = threading.local()

    def compute(run: list[Block]) -> list[tuple[Block, torch.Tensor]]:
        if not hasattr(own, "function"):
            own.function = begin()
        return [(block, own.function(block)) for block in run]

    blocks = blocks_of(layout)
    runs = iter(lambda: list(islice(blocks, _BLOCKS_AT_A_TIME)), [])
    pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="blocks")
    under_way: deque[Future[list[tuple[Block, torch.Tensor]]]] = deque()
    try:
        for run in runs:
            under_way.append(pool.submit(compute, run))
            if len(under_way) > 2 * _NUM_THREADS:
                yield from under_way.popleft().result()
        for computed in under_way:
            yield from computed.result()
    finally:
        pool.shutdown(cancel_futures=True)
