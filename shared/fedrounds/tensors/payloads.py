"""Payloads: named sections, each a safetensors file, one after another in one file."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedrounds.errors import InvalidInput
from fedrounds.files import naming_full_disk
from fedrounds.tensors.codec import MAX_HEADER_BYTES, Layout, digest_file, read_layout, write_state
from fedrounds.types import Section


def write_payload(path: Path, sections: Mapping[str, Mapping[str, Tensor]]) -> tuple[Section, ...]:
    """Write sections in the mapping's order; return their names, digests and sizes.

    Raises:
        InvalidInput: an entry's dtype has no place in the format.
        OutOfSpace: the disk is full.
    """
    written: list[Section] = []
    part = path.with_name(path.name + ".part")
    for name, tensors in sections.items():
        target = part if written else path
        write_state(target, tensors)
        written.append(
            Section(name=name, digest=digest_file(target), size_bytes=target.stat().st_size)
        )
        if target is part:
            with naming_full_disk(path.parent), part.open("rb") as file, path.open("ab") as payload:
                shutil.copyfileobj(file, payload)
            part.unlink()
    return tuple(written)


def read_payload(
    path: Path,
    sections: Sequence[tuple[str, int]],
    *,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> dict[str, tuple[int, Layout]]:
    """Return the offset of each section in a payload, and its layout relative to that offset.

    `sections` are the names and sizes in bytes, in order. `max_header_bytes` bounds the header of
    each.

    Raises:
        InvalidInput: a section isn't a safetensors file, or they don't fill the payload.
    """
    layouts = {}
    offset = 0
    for name, size_bytes in sections:
        layout = read_layout(
            path, offset=offset, size_bytes=size_bytes, max_header_bytes=max_header_bytes
        )
        layouts[name] = (offset, layout)
        offset += size_bytes
    if offset != path.stat().st_size:
        raise InvalidInput(
            f"the payload has {path.stat().st_size} bytes, its sections have {offset}"
        )
    return layouts
