"""An update's file, as admission, aggregation and verification read it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedrounds.strategies.blocks import StateFile
from fedrounds.strategies.compressed import locate_compressed
from fedrounds.tensors.codec import read_layout
from fedrounds.tensors.payloads import read_payload
from fedrounds.types import MODEL_SECTION, Compression, Encoding, EntryKind

HEADER_SLACK_BYTES = 1 << 20
"""How much longer than the model's an update's header may be: spaces, remarks, other names."""


def update_file(
    path: Path,
    *,
    base: StateFile,
    kinds: Mapping[str, EntryKind],
    compression: Compression,
    sections: Sequence[tuple[str, int]],
    num_examples: int,
    num_steps: int = 0,
    global_loss: float | str | None = None,
    own_base: Path | None = None,
    staleness: int = 0,
) -> StateFile:
    """Return an update on the disk, trained from `base`, with the numbers of its header.

    Admitting it, serving a run and verifying it build the same values here; `sections` are names
    and sizes in bytes, the model's first, and `global_loss` may be the name of a number that JSON
    can't hold. `own_base` is the model it began with where that isn't the round's.

    Raises:
        InvalidInput: the bytes aren't those sections, the model's isn't what `compression` makes of
            a model, or a header is far longer than the model's.
    """
    # Under compression a tensor may become two, with longer names.
    max_header_bytes = 3 * len(base.layout.header) + HEADER_SLACK_BYTES
    payload = read_payload(path, sections, max_header_bytes=max_header_bytes)
    files = {
        name: StateFile(path=path, layout=layout, offset=offset)
        for name, (offset, layout) in payload.items()
    }
    model = files.pop(MODEL_SECTION)
    if own_base is not None:
        base = StateFile(path=own_base, layout=read_layout(own_base))
        model = replace(model, base=base)
    if compression.encoding is not Encoding.STATE_DICT:
        compressed = locate_compressed(
            path, model.layout, model=base.layout, kinds=kinds, compression=compression
        )
        model = replace(model, layout=base.layout, base=base, compressed=compressed)
    return replace(
        model,
        others=files,
        num_examples=num_examples,
        num_steps=num_steps,
        global_loss=None if global_loss is None else float(global_loss),
        staleness=staleness,
    )
