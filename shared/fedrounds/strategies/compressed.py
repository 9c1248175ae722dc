"""Compressed updates on disk: validates their files, and reads any block of their deltas.

Every tensor's dtype and shape follows from the model and the run's compression (see
fedrounds.tensors.compression), so no decompressed file can be larger than the model.
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
    compressed_shapes,
    delta_key,
    dequantise,
    first_coordinates,
    scales_key,
    scatter,
    uncompressed_key,
)
from fedrounds.types import Compression, Encoding, EntryKind

_READ_ELEMENTS = 1 << 16
# For each BlockReader; each computing thread has a few of them.
_MAX_OPEN_FILES = 16


@dataclass(frozen=True, kw_only=True)
class CompressedDelta:
    """Where a compressed update's tensors lie in its file.

    For TOP_K alone: `firsts` is the first coordinate of each parameter, and `before` the number of
    values before each chunk, [num_chunks + 1].
    """

    compression: Compression
    layout: Layout
    firsts: Mapping[str, int]
    before: npt.NDArray[np.int64]
    num_coordinates: int


class OpenFiles:
    """Keeps the most recently read files open, until it is deleted."""

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
        """Return elements [begin, begin + count) of a flattened entry.

        The layout's bytes begin at `offset` of the file.

        Raises:
            StorageDamaged: the file is shorter than its layout, or gone.
        """
        entry = layout.entries[name]
        size = entry.dtype.itemsize
        if len(self._buffer) < count * size:
            self._buffer = bytearray(count * size)
        view = memoryview(self._buffer)[: count * size]
        position = offset + entry.begin + begin * size
        num_read = os.preadv(self._files.find(path).fileno(), [view], position)
        if num_read != len(view):
            raise StorageDamaged(f"{path} ends inside tensor {name!r}; restore it from a copy")
        if not count:
            return torch.empty(0, dtype=entry.dtype)
        return torch.frombuffer(self._buffer, dtype=entry.dtype, count=count)


class CompressedReader:
    """Reads and decompresses blocks of deltas; owns the memory they are read into."""

    def __init__(self, files: OpenFiles) -> None:
        self._values, self._others = EntryReader(files), EntryReader(files)

    def read(
        self, path: Path, compressed: CompressedDelta, name: str, *, begin: int, count: int
    ) -> torch.Tensor:
        """Return elements [begin, begin + count) of the flattened delta of a parameter.

        Raises:
            StorageDamaged: the file is shorter than its layout, or gone.
        """
        layout = compressed.layout
        if compressed.compression.encoding is Encoding.TOP_K:
            first = compressed.firsts[name] + begin
            chunks = slice(first // CHUNK_ELEMENTS, -(-(first + count) // CHUNK_ELEMENTS))
            before = compressed.before[chunks.start : chunks.stop + 1]
            run = {"begin": int(before[0]), "count": int(before[-1] - before[0])}
            return scatter(
                self._values.read(path, layout, VALUES, **run),
                _pairs(self._others, path, layout, **run),
                torch.from_numpy(np.diff(before)),
                begin=first,
                count=count,
            )
        values = self._values.read(path, layout, delta_key(name), begin=begin, count=count)
        if compressed.compression.encoding is not Encoding.INT8:
            return values
        size = compressed.compression.block_size
        first_block, last_block = begin // size, -(-(begin + count) // size)
        scales = self._others.read(
            path, layout, scales_key(name), begin=first_block, count=last_block - first_block
        )
        return dequantise(values, scales, begin=begin, block_size=size)


def expected_tensors(
    model: Layout, kinds: Mapping[str, EntryKind], compression: Compression
) -> dict[str, Shape]:
    """Return the dtype and shape of every tensor in a compressed update of a model."""
    others = {
        uncompressed_key(name): (entry.dtype, entry.shape)
        for name, entry in model.entries.items()
        if kinds[name] is not EntryKind.PARAMETER
    }
    return compressed_shapes(_parameters(model, kinds), compression) | others


def locate_compressed(
    path: Path,
    layout: Layout,
    *,
    model: Layout,
    kinds: Mapping[str, EntryKind],
    compression: Compression,
) -> CompressedDelta:
    """Return where a compressed update's tensors lie; `layout` is that of the file's first section.

    Raises:
        InvalidInput: the tensors aren't those of an update of this model.
    """
    expected = expected_tensors(model, kinds, compression)
    sent = {name: (entry.dtype, entry.shape) for name, entry in layout.entries.items()}
    for name in sorted(expected.keys() | sent.keys()):
        if expected.get(name) != sent.get(name):
            raise InvalidInput(
                f"tensor {name[:80]!r} is {_description(sent.get(name))}; an update compressed by "
                f"{compression.encoding} has {_description(expected.get(name))} there"
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
    return CompressedDelta(
        compression=compression,
        layout=layout,
        firsts=first_coordinates(parameters),
        before=np.concatenate([[0], np.cumsum(counts)]),
        num_coordinates=sum(math.prod(shape) for _, shape in parameters.values()),
    )


def validate_compressed(path: Path, compressed: CompressedDelta) -> None:
    """Validate the values that compression itself adds: scales and indices.

    Raises:
        InvalidInput: a scale is negative or not finite, or an index is out of range or not greater
            than the index before it.
    """
    reader = EntryReader(OpenFiles())
    if compressed.compression.encoding is Encoding.INT8:
        for name, entry in compressed.layout.entries.items():
            if name.startswith(scales_key("")):
                _validate_scales(reader, path, compressed.layout, name, num_scales=entry.shape[0])
    elif compressed.compression.encoding is Encoding.TOP_K:
        for chunk, (begin, end) in enumerate(
            zip(compressed.before, compressed.before[1:], strict=False)
        ):
            run = {"begin": int(begin), "count": int(end - begin)}
            pairs = _pairs(reader, path, compressed.layout, **run).long()
            indices = pairs[:, 0] + 256 * pairs[:, 1]
            length = min(CHUNK_ELEMENTS, compressed.num_coordinates - chunk * CHUNK_ELEMENTS)
            steps = torch.diff(indices, append=torch.tensor([length]))
            if bool((steps <= 0).any()):
                number = int(torch.nonzero(steps <= 0)[0])
                raise InvalidInput(
                    f"{OFFSETS!r} has {int(indices[number])} as number {number} (from 0) of chunk "
                    f"{chunk}; "
                    f"a chunk's indices ascend and are below {length}"
                )


def _validate_scales(
    reader: EntryReader, path: Path, layout: Layout, name: str, *, num_scales: int
) -> None:
    for begin in range(0, num_scales, _READ_ELEMENTS):
        count = min(_READ_ELEMENTS, num_scales - begin)
        scales = reader.read(path, layout, name, begin=begin, count=count)
        bad = torch.nonzero(~(torch.isfinite(scales) & (scales >= 0)))
        if len(bad):
            index = int(bad[0])
            raise InvalidInput(
                f"tensor {name[:80]!r} holds {float(scales[index])} at element {begin + index}; a "
                "scale is finite and not below 0"
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


def _description(shape: Shape | None) -> str:
    return "nothing" if shape is None else f"{shape[0]} {list(shape[1])}"
