"""state_dict <-> safetensors bytes, and the digest that names them.

A safetensors file is 8 bytes of header length (little-endian), a JSON header that gives every
tensor's dtype, shape and byte range, and the tensors' bytes. Encoding is the safetensors library's;
reading the header is ours, because the server works on files it never loads whole.
"""

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from fedrounds.errors import InvalidInput
from fedrounds.files import naming_full_disk

MAX_HEADER_BYTES = 16 * 1024 * 1024
_MAX_DIMENSIONS = 64
_MAX_COUNT = 2**63 - 1
_LENGTH_BYTES = 8

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its bytes are [begin, end) from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Where every tensor of a safetensors file lies; entries are in the order of their bytes."""

    header: bytes
    entries: Mapping[str, Entry]
    size_bytes: int


def digest_bytes(payload: bytes | bytearray | memoryview) -> str:
    """Return the BLAKE3-256 digest of `payload` as 64 hexadecimal digits."""
    return blake3(payload).hexdigest()


def digest_file(path: Path, *, offset: int = 0, size_bytes: int | None = None) -> str:
    """Return the BLAKE3-256 digest of `size_bytes` bytes of a file from `offset` on.

    None: to the end of the file. It reads blocks of 1 MiB.
    """
    hasher = blake3()
    buffer = memoryview(bytearray(1 << 20))
    left = sys.maxsize if size_bytes is None else size_bytes
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while count := file.readinto(buffer[: min(left, len(buffer))]):
            hasher.update(buffer[:count])
            left -= count
    return hasher.hexdigest()


def encode_state(state_dict: Mapping[str, torch.Tensor]) -> bytes:
    """Return the bytes that `write_state` writes."""
    return safetensors_torch.save(_without_sharing(state_dict))


def decode_state(payload: bytes) -> dict[str, torch.Tensor]:
    """Return the state_dict held by safetensors bytes; the inverse of `encode_state`.

    Raises:
        InvalidInput: the bytes aren't a safetensors file.
    """
    try:
        return safetensors_torch.load(payload)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"the payload is not a safetensors file: {error}") from error


def write_state(path: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a state_dict as a safetensors file, without a copy of it in memory.

    The same tensors give the same bytes, in whatever order the mapping holds them. Tensors that
    share memory (tied weights) are written once for each name; 0-dim and empty tensors keep their
    shape.

    Raises:
        InvalidInput: an entry's dtype has no place in the format (complex numbers, say).
        OutOfSpace: the disk is full.
    """
    with naming_full_disk(path.parent):
        try:
            safetensors_torch.save_file(_without_sharing(state_dict), path)
        except SafetensorError as error:
            # The library gives the operating system's error only as text.
            if match := re.search(r"\(os error (\d+)\)", str(error)):
                number = int(match[1])
                raise OSError(number, os.strerror(number)) from error
            raise


def load_state_into(state_dict: Mapping[str, torch.Tensor], path: Path) -> None:
    """Fill the tensors of a state_dict (such as a model's own) from a safetensors file.

    The bytes go directly into the tensors, without a second copy of the model in memory.

    Raises:
        InvalidInput: the file isn't a safetensors file, or names, shapes or dtypes differ.
    """
    layout = read_layout(path)
    in_model = {name: _describe(tensor) for name, tensor in state_dict.items()}
    in_file = {name: _describe(entry) for name, entry in layout.entries.items()}
    if differing := sorted(
        name for name in in_model.keys() | in_file.keys() if in_model.get(name) != in_file.get(name)
    ):
        name = differing[0]
        raise InvalidInput(
            f"{len(differing)} tensors differ from the model's, first {name!r}: "
            f"{in_file.get(name, 'nothing')} in the file, "
            f"{in_model.get(name, 'nothing')} in the model"
        )
    with path.open("rb", buffering=0) as file, torch.no_grad():
        for name, entry in layout.entries.items():
            target = state_dict[name]
            is_direct = target.is_contiguous() and target.device.type == "cpu"
            landing = target.detach() if is_direct else torch.empty(entry.shape, dtype=entry.dtype)
            file.seek(entry.begin)
            view = landing.reshape(-1).view(torch.uint8).numpy().data
            while view:
                count = file.readinto(view)
                if not count:
                    raise InvalidInput(f"{path} ends inside tensor {name!r}")
                view = view[count:]
            if not is_direct:
                target.copy_(landing)


def _describe(tensor: torch.Tensor | Entry) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def read_layout(
    path: Path,
    *,
    offset: int = 0,
    size_bytes: int | None = None,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> Layout:
    """Return the layout of the safetensors file at [offset, offset + size_bytes) of `path`.

    Every byte must belong to the header or to exactly one tensor, as the format requires. A header
    larger than `max_header_bytes` is refused unread: parsed, it takes many times its size in
    memory.

    Raises:
        InvalidInput: the bytes aren't such a file; the message says why.
    """
    total = (path.stat().st_size - offset) if size_bytes is None else size_bytes
    with path.open("rb") as file:
        file.seek(offset)
        prefix = file.read(_LENGTH_BYTES)
        header_bytes = int.from_bytes(prefix, "little")
        most_bytes = min(MAX_HEADER_BYTES, max_header_bytes, total - _LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES or header_bytes > most_bytes:
            raise InvalidInput(
                f"the payload of {total} bytes is not a safetensors file: its header claims "
                f"{header_bytes} bytes, at most {max(0, most_bytes)} are possible"
            )
        header = prefix + file.read(header_bytes)
    try:
        described = json.loads(header[_LENGTH_BYTES:].decode())
        entries = [
            (name, _parse_entry(name, fields, len(header)))
            for name, fields in described.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"the payload's safetensors header can't be read: {error}") from error
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    position = len(header)
    for name, entry in entries:
        if entry.begin != position:
            raise InvalidInput(
                f"tensor {name!r} begins at byte {entry.begin}, expected {position}: "
                "tensors must follow each other without gap or overlap"
            )
        position = entry.end
    if position != total:
        raise InvalidInput(f"the payload has {total} bytes, its tensors end at byte {position}")
    return Layout(header=header, entries=dict(entries), size_bytes=total)


def make_layout(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Layout:
    """Return the layout of a file with tensors of these dtypes and shapes, in their order.

    It serves to write the file block by block: first the header, then the tensors' bytes.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    described, position = {}, 0
    for tensor_name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        described[tensor_name] = {
            "dtype": names[dtype],
            "shape": shape,
            "data_offsets": (position, end),
        }
        position = end
    text = json.dumps(described, separators=(",", ":")).encode()
    # The format aligns the tensors by spaces after the header's text.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    entries = {
        name: _parse_entry(name, fields, len(header)) for name, fields in json.loads(text).items()
    }
    return Layout(header=header, entries=entries, size_bytes=len(header) + position)


def _without_sharing(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors on the CPU, contiguous, none sharing memory with another."""
    known = set(DTYPES.values())
    owned: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().resolve_neg().contiguous()
        if tensor.dtype not in known:
            raise InvalidInput(
                f"tensor {name!r} has dtype {tensor.dtype}, which can't be sent; "
                f"use one of {', '.join(str(dtype) for dtype in DTYPES.values())}"
            )
        storage = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return owned


def _parse_entry(name: str, fields: Mapping[str, object], data_start: int) -> Entry:
    name.encode()  # a lone surrogate would break whoever writes the name down
    dtype_name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise InvalidInput(f"tensor {name!r} has dtype {dtype_name!r}; known: {', '.join(DTYPES)}")
    if not _is_list_of_counts(shape) or not _is_list_of_counts(offsets) or len(offsets) != 2:
        raise InvalidInput(f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    dtype = DTYPES[dtype_name]
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InvalidInput(
            f"tensor {name!r} of shape {shape} and dtype {dtype_name} takes "
            f"{math.prod(shape) * dtype.itemsize} bytes, its offsets span {end - begin}"
        )
    return Entry(dtype=dtype, shape=tuple(shape), begin=data_start + begin, end=data_start + end)


def _is_list_of_counts(value: object) -> TypeGuard[list[int]]:
    # Bounded, so that no number computed or printed from them can be extremely long.
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(item) is int and 0 <= item <= _MAX_COUNT for item in value)
    )
