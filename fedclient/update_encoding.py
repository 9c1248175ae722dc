"""What is sent of a trained model: its state_dict as it is, or the delta compressed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedrounds.tensors.codec import load_state_into
from fedrounds.tensors.compression import compress, decompress, delta_of, relative_error, whole_key
from fedrounds.types import Compression, Encoding, EntryKind

State = Mapping[str, Tensor]

RESIDUAL = "residual"
"""The name under which a client keeps what TOP_K left out of its updates that count."""


@dataclass(frozen=True, kw_only=True)
class PackedUpdate:
    """A model section's tensors, what is said of them, and what is kept if the order is counted.

    `metrics` hold compression_error, the L2 norm of what was lost over that of what was to be sent,
    if something was compressed. Under TOP_K RESIDUAL is kept: what was lost, by parameter, which is
    to be added to the next delta.
    """

    tensors: State
    metrics: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, State] = field(default_factory=dict)


def pack_update(
    trained: State,
    *,
    global_model: Path,
    kinds: Mapping[str, EntryKind],
    compression: Compression,
    seed: int,
    residual: State,
) -> PackedUpdate:
    """Return what is sent of a trained model; a function of its arguments, `seed` among them.

    Only the parameters among the entries, of these `kinds`, are compressed. `residual` is what
    earlier updates that count have left out.
    """
    if compression.encoding is Encoding.STATE_DICT:
        return PackedUpdate(tensors=trained)
    base = {name: torch.empty_like(one, device="cpu") for name, one in trained.items()}
    load_state_into(base, global_model)
    parameters = sorted(name for name, kind in kinds.items() if kind is EntryKind.PARAMETER)
    delta = {name: delta_of(trained[name].cpu(), base[name]) for name in parameters}
    for name, left_out in residual.items():
        delta[name] += left_out
    packed = compress(delta, compression, seed=seed)
    shapes = {name: (base[name].dtype, tuple(base[name].shape)) for name in delta}
    received = decompress(packed, shapes, compression)
    others = {whole_key(name): one for name, one in trained.items() if name not in delta}
    kept = {}
    if compression.encoding is Encoding.TOP_K:
        kept[RESIDUAL] = {name: one - received[name] for name, one in delta.items()}
    return PackedUpdate(
        tensors=packed | others,
        metrics={"compression_error": relative_error(delta, received)},
        kept=kept,
    )
