"""Lossy compression of client updates: a delta to fewer bytes and back.

Only the delta (local minus global) of the parameters is compressed. All other entries of a
state_dict are sent uncompressed: counters can't be rounded, and BatchNorm's running statistics are
few; an error that a weight bears well could make a variance negative.

- FLOAT16, BFLOAT16: a cast; a value beyond the type's range becomes its largest number.
- INT8: blocks of `block_size` values share a scale, the block's largest magnitude over 127. Each
  value becomes an integer multiple of it, rounded at random so that its expectation is the value
  (stochastic rounding: Alistarh et al. 2017, QSGD, with the largest magnitude as norm).
- TOP_K: the `fraction` of all coordinates that are largest in magnitude are sent as they are, the
  others not at all. ||x - C(x)||^2 <= (1 - k/d) ||x||^2. The caller adds what is left out to the
  next delta (error feedback: Stich et al. 2018, "Sparsified SGD with Memory"; Karimireddy et al.
  2019).

A compressed delta is again a mapping of tensors. Their shapes follow from the delta's shapes and
the parameters of the compression: see `compressed_shapes`. This module knows no files and no wire.
"""

import math
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fedrounds.seeds import derive_seed
from fedrounds.tensors.rounding import rounded
from fedrounds.types import Compression, Encoding

CHUNK_ELEMENTS = 1 << 16
"""TOP_K numbers coordinates within chunks of this length: an index then takes two bytes."""

Shape = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and dimensions."""

CASTS: Mapping[Encoding, torch.dtype] = {
    Encoding.FLOAT16: torch.float16,
    Encoding.BFLOAT16: torch.bfloat16,
}
VALUES, OFFSETS, COUNTS = "values", "offsets", "counts"
_LEVELS = 127
# float32's largest number is (2^24 - 1) 2^104. Its 127th part lies between 2^121 and 2^122, where
# float32 has steps of 2^98: rounded down to one of these, 127 times the scale is finite.
_LARGEST = (((2**24 - 1) << 6) // _LEVELS) * _LEVELS * 2.0**98
_SLICE_ELEMENTS = 1 << 20


def delta_key(name: str) -> str:
    """Return the name of a parameter's values in an update; TOP_K has all of them in VALUES."""
    return f"delta/{name}"


def scales_key(name: str) -> str:
    """Return the name of the scales of a parameter's blocks, under INT8."""
    return f"scales/{name}"


def uncompressed_key(name: str) -> str:
    """Return the name of an entry that isn't compressed."""
    return f"whole/{name}"


def delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the delta of an entry of this dtype is computed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def delta_of(local: Tensor, base: Tensor) -> Tensor:
    """Return local minus base."""
    dtype = delta_dtype(base.dtype)
    return local.to(dtype) - base.to(dtype)


def restored(base: Tensor, delta: Tensor) -> Tensor:
    """Return base plus delta, rounded once to the base's dtype."""
    if base.dtype is torch.float32:
        return base + delta.float()
    # Of numbers of float32 and narrower, float64 holds the exact sum wherever it matters.
    return rounded(base.double() + delta.double(), base.dtype)


def num_kept(num_elements: int, fraction: float) -> int:
    """Return the number of coordinates that TOP_K sends: the share, rounded up."""
    return min(num_elements, math.ceil(fraction * num_elements))


def first_coordinates(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the index at which each parameter begins in the vector of all, in name order."""
    firsts, position = {}, 0
    for name in sorted(shapes):
        firsts[name] = position
        position += math.prod(shapes[name][1])
    return firsts


def compressed_shapes(shapes: Mapping[str, Shape], compression: Compression) -> dict[str, Shape]:
    """Return the tensors that the delta of parameters of these shapes is compressed to.

    Casts: `delta/NAME` of NAME's shape. INT8: `delta/NAME` and `scales/NAME`, float32 [num_blocks],
    blocks being counted in the flattened tensor. TOP_K, over all parameters flattened one after
    another in name order, k coordinates in ascending order: `values` [k], `offsets` uint8 [k, 2],
    the coordinate's index in its chunk of CHUNK_ELEMENTS (low byte first), and `counts` int32
    [num_chunks], the number of coordinates sent of each chunk.
    """
    encoding = compression.encoding
    if encoding in CASTS:
        return {delta_key(name): (CASTS[encoding], shape) for name, (_, shape) in shapes.items()}
    if encoding is Encoding.INT8:
        compressed: dict[str, Shape] = {}
        for name, (_, shape) in shapes.items():
            num_blocks = -(-math.prod(shape) // compression.block_size)
            compressed[delta_key(name)] = (torch.int8, shape)
            compressed[scales_key(name)] = (torch.float32, (num_blocks,))
        return compressed
    assert encoding is Encoding.TOP_K
    num_elements = sum(math.prod(shape) for _, shape in shapes.values())
    kept = num_kept(num_elements, compression.fraction)
    return {
        VALUES: (_widest(dtype for dtype, _ in shapes.values()), (kept,)),
        OFFSETS: (torch.uint8, (kept, 2)),
        COUNTS: (torch.int32, (-(-num_elements // CHUNK_ELEMENTS),)),
    }


def compress(
    delta: Mapping[str, Tensor], compression: Compression, *, seed: int
) -> dict[str, Tensor]:
    """Return the compressed delta of some parameters (see `compressed_shapes`).

    It depends on the arguments alone: all random rounding is drawn from `seed`.
    """
    encoding = compression.encoding
    if encoding in CASTS:
        return {delta_key(name): cast(values, CASTS[encoding]) for name, values in delta.items()}
    if encoding is Encoding.INT8:
        compressed = {}
        for name in sorted(delta):
            flat = delta[name].reshape(-1).contiguous()
            # Drawn by content: tied weights, the same numbers under two names, stay the same.
            stream = derive_seed(seed, f"rounding {zlib.crc32(flat.numpy().data)}")
            generator = torch.Generator().manual_seed(stream)
            values, scales = quantise(flat, compression.block_size, generator=generator)
            compressed[delta_key(name)] = values.view(delta[name].shape)
            compressed[scales_key(name)] = scales
        return compressed
    assert encoding is Encoding.TOP_K
    vector = _vector(delta)
    chosen = largest(vector, num_kept(len(vector), compression.fraction))
    within = chosen % CHUNK_ELEMENTS
    counts = torch.bincount(chosen // CHUNK_ELEMENTS, minlength=-(-len(vector) // CHUNK_ELEMENTS))
    return {
        VALUES: vector[chosen],
        OFFSETS: torch.stack([within % 256, within // 256], dim=1).to(torch.uint8),
        COUNTS: counts.to(torch.int32),
    }


def decompress(
    compressed: Mapping[str, Tensor], shapes: Mapping[str, Shape], compression: Compression
) -> dict[str, Tensor]:
    """Return the delta that `compressed` stands for, in the dtypes that `delta_dtype` says."""
    if compression.encoding is Encoding.TOP_K:
        num_elements = sum(math.prod(shape) for _, shape in shapes.values())
        vector = scatter(
            compressed[VALUES],
            compressed[OFFSETS],
            compressed[COUNTS],
            begin=0,
            count=num_elements,
        )
        firsts = first_coordinates(shapes)
        flat = {
            name: vector[firsts[name] : firsts[name] + math.prod(shape)]
            for name, (_, shape) in shapes.items()
        }
    elif compression.encoding is Encoding.INT8:
        flat = {
            name: dequantise(
                compressed[delta_key(name)].reshape(-1),
                compressed[scales_key(name)],
                begin=0,
                block_size=compression.block_size,
            )
            for name in shapes
        }
    else:
        flat = {name: compressed[delta_key(name)].reshape(-1) for name in shapes}
    return {
        name: flat[name].to(delta_dtype(dtype)).view(shape)
        for name, (dtype, shape) in shapes.items()
    }


def relative_error(delta: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> float:
    """Return ||received - delta|| / ||delta|| over all parameters, 0 for a delta of zeros."""
    norm = _norm(delta.values())
    if norm == math.inf:
        # Squares of 1e300 are more than float64 holds.
        small = {name: values.double() / 2.0**600 for name, values in delta.items()}
        return relative_error(small, {name: received[name].double() / 2.0**600 for name in small})
    error = _norm(received[name] - values for name, values in delta.items())
    return error / norm if norm else 0.0


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values in a narrower type; a value beyond its range becomes its largest number."""
    largest_number = torch.finfo(dtype).max
    return values.clamp(-largest_number, largest_number).to(dtype)


def quantise(
    values: Tensor, block_size: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return [count] values as int8 [count], and the scales of their blocks, float32 [num_blocks].

    The expectation of scale * int8 over the generator's draws is the value, within 2^-46 of a
    scale. A value beyond float32's range becomes about its largest number.
    """
    count = len(values)
    num_blocks = -(-count // block_size)
    rounded = torch.empty(count, dtype=torch.int8)
    scales = torch.empty(num_blocks, dtype=torch.float32)
    at_a_time = max(1, _SLICE_ELEMENTS // block_size)
    for first in range(0, num_blocks, at_a_time):
        last = min(num_blocks, first + at_a_time)
        begin, end = first * block_size, min(count, last * block_size)
        rows = torch.zeros((last - first) * block_size, dtype=torch.float64)
        rows[: end - begin] = values[begin:end]
        rows = rows.view(last - first, block_size)
        # So that a scale times 127 is finite in float32.
        rows.clamp_(-_LARGEST, _LARGEST)
        largest_of = rows.abs().amax(dim=1)
        scale = (largest_of / _LEVELS).float()
        # Rounded down, the largest value would lie beyond the last level and lose its mean.
        too_small = scale.double() * _LEVELS < largest_of
        scale = torch.where(too_small, torch.nextafter(scale, torch.tensor(torch.inf)), scale)
        scales[first:last] = scale
        rows /= torch.where(scale > 0, scale, 1.0).double()[:, None]
        rows += torch.rand(rows.shape, dtype=torch.float64, generator=generator)
        # 127 and nearly 1 can make 128.
        rows.floor_().clamp_(max=_LEVELS)
        rounded[begin:end] = rows.view(-1)[: end - begin].to(torch.int8)
    return rounded, scales


def dequantise(values: Tensor, scales: Tensor, *, begin: int, block_size: int) -> Tensor:
    """Return scale * value, float32 [count], of coordinates [begin, begin + count) of a tensor.

    `scales` holds the scales of the blocks that contain these coordinates, in order.
    """
    lead = begin % block_size
    rows = torch.empty(len(scales), block_size)
    flat = rows.view(-1)[lead : lead + len(values)]
    flat.copy_(values)
    rows.mul_(scales[:, None])
    return flat


def largest(vector: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest magnitudes, ascending; of equals the first."""
    magnitudes = vector.abs()
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    threshold = magnitudes.kthvalue(len(vector) - count + 1).values
    above = magnitudes > threshold
    tied = torch.nonzero(magnitudes == threshold).view(-1)
    above[tied[: count - int(above.sum())]] = True
    return torch.nonzero(above).view(-1)


def scatter(values: Tensor, offsets: Tensor, counts: Tensor, *, begin: int, count: int) -> Tensor:
    """Return coordinates [begin, begin + count) of the vector that TOP_K sends, 0 if not sent.

    `counts` begins with the chunk that contains `begin`; `values` and `offsets` belong to the
    chunks that `counts` covers.
    """
    vector = torch.zeros(count, dtype=values.dtype)
    chunks = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
    indices = offsets[:, 0].long() + 256 * offsets[:, 1].long()
    indices += chunks * CHUNK_ELEMENTS - begin % CHUNK_ELEMENTS
    inside = (indices >= 0) & (indices < count)
    vector[indices[inside]] = values[inside]
    return vector


def _vector(delta: Mapping[str, Tensor]) -> Tensor:
    """Return all parameters flattened one after another in name order."""
    dtype = _widest(values.dtype for values in delta.values())
    parts = [delta[name].reshape(-1).to(dtype) for name in sorted(delta)]
    return torch.cat([torch.empty(0, dtype=dtype), *parts])


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32
