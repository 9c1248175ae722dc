"""How a trained model is encoded for sending: its state_dict as it is, or its delta compressed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedclient.state import Tensors
from fedrounds.tensors.codec import load_state_into
from fedrounds.tensors.compression import (
    compress,
    decompress,
    delta_of,
    relative_error,
    uncompressed_key,
)
from fedrounds.types import Compression, Encoding, EntryKind

RESIDUAL = "residual"
"""The name under which a client keeps what TOP_K left out of its counted updates."""


@dataclass(frozen=True, kw_only=True)
class EncodedUpdate:
    """The tensors of a model section, with metrics, and what the client keeps if the order counts.

    If the delta was compressed, `metrics` holds compression_error: the L2 norm of the error over
    that of the delta. Under TOP_K `kept` holds RESIDUAL: what was left out, by parameter; the
    client adds it to its next delta.
    """

    tensors: Tensors
    metrics: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, Tensors] = field(default_factory=dict)


def encode_update(
    trained: Tensors,
    *,
    global_model: Path,
    kinds: Mapping[str, EntryKind],
    compression: Compression,
    seed: int,
    residual: Tensors,
) -> EncodedUpdate:
    """Return the encoding of a trained model; it depends on the arguments alone.

    Compresses the entries of kind PARAMETER only. `residual` is what earlier counted updates left
    out, by parameter; it is empty except under TOP_K.
    """
    if compression.encoding is Encoding.STATE_DICT:
        return EncodedUpdate(tensors=trained)
    base = {name: torch.empty_like(tensor, device="cpu") for name, tensor in trained.items()}
    load_state_into(base, global_model)
    parameters = sorted(name for name, kind in kinds.items() if kind is EntryKind.PARAMETER)
    delta = {name: delta_of(trained[name].cpu(), base[name]) for name in parameters}
    for name, left_out in residual.items():
        delta[name] += left_out
    compressed = compress(delta, compression, seed=seed)
    shapes = {name: (base[name].dtype, tuple(base[name].shape)) for name in delta}
    received = decompress(compressed, shapes, compression)
    others = {
        uncompressed_key(name): tensor for name, tensor in trained.items() if name not in delta
    }
    kept = {}
    if compression.encoding is Encoding.TOP_K:
        kept[RESIDUAL] = {name: values - received[name] for name, values in delta.items()}
    return EncodedUpdate(
        tensors=compressed | others,
        metrics={"compression_error": relative_error(delta, received)},
        kept=kept,
    )
