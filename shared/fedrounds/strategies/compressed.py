"""Compressed updates on disk: what must lie in their files, and any block of their deltas.

Every tensor's dtype and shape follows from the model and the run's compression (see
fedrounds.tensors.compression), so no file can become larger when it is unpacked than the model is.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedrounds.errors import InvalidInput, StorageDamaged
from fedrounds.tensors.codec import Layout
from fedrounds.tensors.compression import (
    CHUNK_ELEMENTS,
    COUNTS,
    OFFSETS,
    VALUES,
    Shape,
    delta_key,
    dequantise,
    first_coordinates,
    packed_shapes,
    scales_key,
    spread,
    whole_key,
)
from fedrounds.types import Compression, Encoding, EntryKind

_READ_ELEMENTS = 1 << 16
# Of a reader of blocks; there are a few in each thread that computes.
_MAX_OPEN_FILES = 16


@dataclass(frozen=True, kw_only=True)
class PackedDelta:
    """Where a compressed update's tensors lie in its file.

    Of TOP_K alone: `firsts` says where each parameter begins among the coordinates, and `before`
    how many values are there before each chunk of them, [num_chunks + 1].
    """

    compression: Compression
    layout: Layout
    firsts: Mapping[str, int]
    before: npt.NDArray[np.int64]
    num_coordinates: int


class OpenFiles:
    """Keeps the files open that were read last, as long as it is there."""

    def __init__(self) -> None:
        self._open: dict[Path, FileIO] = {}

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()

    def find(self, path: Path) -> FileIO:
        """Return the open file.

        Raises:
            StorageDamaged: it is gone.
        """
        if path in self._open:
            return self._open[path]
        if len(self._open) >= _MAX_OPEN_FILES:
            self._open.pop(next(iter(self._open))).close()
        try:
            self._open[path] = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise StorageDamaged(f"{path} is gone; restore it from a copy") from error
        return self._open[path]


class EntryReader:
    """Owns the buffer that tensors are read into; `read` overwrites what it returned before."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._buffer = bytearray()

    def read(
        self, path: Path, layout: Layout, name: str, *, begin: int, count: int, offset: int = 0
    ) -> torch.Tensor:
        """Return `count` elements of an entry from the flattened one's `begin` on, [count].

        The layout's bytes begin at `offset` of the file.

        Raises:
            StorageDamaged: the file is shorter than its layout, or gone.
        """
        entry = layout.entries[name]
        size = entry.dtype.itemsize
        if len(self._buffer) < count * size:
            self._buffer = bytearray(count * size)
        view = memoryview(self._buffer)[: count * size]
        place = offset + entry.begin + begin * size
        num_read = os.preadv(self._files.find(path).fileno(), [view], place)
        if num_read != len(view):
            raise StorageDamaged(f"{path} ends inside tensor {name!r}; restore it from a copy")
        if not count:
            return torch.empty(0, dtype=entry.dtype)
        return torch.frombuffer(self._buffer, dtype=entry.dtype, count=count)


class PackedReader:
    """Unpacks blocks of compressed deltas; owns the memory they are read into."""

    def __init__(self, files: OpenFiles) -> None:
        self._values, self._others = EntryReader(files), EntryReader(files)

    def read(
        self, path: Path, packed: PackedDelta, name: str, *, begin: int, count: int
    ) -> torch.Tensor:
        """Return `count` elements of a parameter's delta from the flattened one's `begin` on.

        Raises:
            StorageDamaged: the file is shorter than its layout, or gone.
        """
        layout = packed.layout
        if packed.compression.encoding is Encoding.TOP_K:
            first = packed.firsts[name] + begin
            chunks = slice(first // CHUNK_ELEMENTS, -(-(first + count) // CHUNK_ELEMENTS))
            before = packed.before[chunks.start : chunks.stop + 1]
            run = {"begin": int(before[0]), "count": int(before[-1] - before[0])}
            return spread(
                self._values.read(path, layout, VALUES, **run),
                _pairs(self._others, path, layout, **run),
                torch.from_numpy(np.diff(before)),
                begin=first,
                count=count,
            )
        values = self._values.read(path, layout, delta_key(name), begin=begin, count=count)
        if packed.compression.encoding is not Encoding.INT8:
            return values
        size = packed.compression.block_size
        first_block, last_block = begin // size, -(-(begin + count) // size)
        scales = self._others.read(
            path, layout, scales_key(name), begin=first_block, count=last_block - first_block
        )
        return dequantise(values, scales, begin=begin, block_size=size)


def expected_tensors(
    model: Layout, kinds: Mapping[str, EntryKind], compression: Compression
) -> dict[str, Shape]:
    """Return what a compressed update of a model holds."""
    others = {
        whole_key(name): (entry.dtype, entry.shape)
        for name, entry in model.entries.items()
        if kinds[name] is not EntryKind.PARAMETER
    }
    return packed_shapes(_parameters(model, kinds), compression) | others


def locate_packed(
    path: Path,
    layout: Layout,
    *,
    model: Layout,
    kinds: Mapping[str, EntryKind],
    compression: Compression,
) -> PackedDelta:
    """Return where a compressed update's tensors lie; `layout` is of the file's first section.

    Raises:
        InvalidInput: they aren't those that an update of this model has.
    """
    expected = expected_tensors(model, kinds, compression)
    sent = {name: (one.dtype, one.shape) for name, one in layout.entries.items()}
    for name in sorted(expected.keys() | sent.keys()):
        if expected.get(name) != sent.get(name):
            raise InvalidInput(
                f"tensor {name[:80]!r} is {_described(sent.get(name))}; an update compressed by "
                f"{compression.encoding} has {_described(expected.get(name))} there"
            )
    parameters = _parameters(model, kinds)
    counts = np.zeros(0, dtype=np.int64)
    if compression.encoding is Encoding.TOP_K:
        num_chunks = layout.entries[COUNTS].shape[0]
        read = EntryReader(OpenFiles()).read(path, layout, COUNTS, begin=0, count=num_chunks)
        counts = read.numpy().astype(np.int64)
        num_values = layout.entries[VALUES].shape[0]
        if (counts < 0).any() or counts.sum() != num_values:
            raise InvalidInput(
                f"{COUNTS!r} has {counts.sum()} indices in all and {counts.min()} in one chunk; "
                f"they must count the {num_values} values that are there"
            )
    return PackedDelta(
        compression=compression,
        layout=layout,
        firsts=first_coordinates(parameters),
        before=np.concatenate([[0], np.cumsum(counts)]),
        num_coordinates=sum(math.prod(shape) for _, shape in parameters.values()),
    )


def examine_packed(path: Path, packed: PackedDelta) -> None:
    """Examine what only the way of packing gives a meaning to: scales, and indices.

    Raises:
        InvalidInput: a scale is negative or isn't finite, or an index is out of range or isn't
            greater than the one before.
    """
    reader = EntryReader(OpenFiles())
    if packed.compression.encoding is Encoding.INT8:
        for name, entry in packed.layout.entries.items():
            if name.startswith(scales_key("")):
                _examine_scales(reader, path, packed.layout, name, num_scales=entry.shape[0])
    elif packed.compression.encoding is Encoding.TOP_K:
        for chunk, (begin, end) in enumerate(zip(packed.before, packed.before[1:], strict=False)):
            run = {"begin": int(begin), "count": int(end - begin)}
            pairs = _pairs(reader, path, packed.layout, **run).long()
            places = pairs[:, 0] + 256 * pairs[:, 1]
            length = min(CHUNK_ELEMENTS, packed.num_coordinates - chunk * CHUNK_ELEMENTS)
            steps = torch.diff(places, append=torch.tensor([length]))
            if bool((steps <= 0).any()):
                at = int(torch.nonzero(steps <= 0)[0])
                raise InvalidInput(
                    f"{OFFSETS!r} has {int(places[at])} as number {at} (from 0) of chunk {chunk}; "
                    f"a chunk's indices ascend and are below {length}"
                )


def _examine_scales(
    reader: EntryReader, path: Path, layout: Layout, name: str, *, num_scales: int
) -> None:
    for begin in range(0, num_scales, _READ_ELEMENTS):
        count = min(_READ_ELEMENTS, num_scales - begin)
        scales = reader.read(path, layout, name, begin=begin, count=count)
        bad = torch.nonzero(~(torch.isfinite(scales) & (scales >= 0)))
        if len(bad):
            at = int(bad[0])
            raise InvalidInput(
                f"tensor {name[:80]!r} holds {float(scales[at])} at element {begin + at}; a scale "
                "is finite and not below 0"
            )


def _parameters(model: Layout, kinds: Mapping[str, EntryKind]) -> dict[str, Shape]:
    return {
        name: (entry.dtype, entry.shape)
        for name, entry in model.entries.items()
        if kinds[name] is EntryKind.PARAMETER
    }


def _pairs(
    reader: EntryReader, path: Path, layout: Layout, *, begin: int, count: int
) -> torch.Tensor:
    read = reader.read(path, layout, OFFSETS, begin=2 * begin, count=2 * count)
    return read.view(count, 2)


def _described(shape: Shape | None) -> str:
    return "nothing" if shape is None else f"{shape[0]} {list(shape[1])}"
