"""What makes an update good: checks that need nothing but the update and the model it began from.

What compares a client with its cohort comes later, when the round closes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedserver.strategies.blocks import Block, BlockReader, StateFile, blocks_of
from shared.errors import InvalidInput
from shared.types import METRIC_NAMES, MODEL_SECTION, ClientUpdate
from shared.weights import EntryKind

MAX_WEIGHT = 2**29 - 1
"""Above, num_examples * float32 isn't exact in float64 any more (see strategies.means)."""

_HEADER_SLACK_BYTES = 1 << 20


class UpdateRefused(InvalidInput):
    """The update must not enter an aggregate; the message says what is wrong and where."""


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """The bounds that were frozen when the round opened.

    `max_delta_norm` bounds the L2 norm of local minus global over all parameters.
    """

    max_num_examples: int
    max_delta_norm: float
    max_steps_per_example: int


def examine_header(update: ClientUpdate, base: StateFile, limits: AdmissionLimits) -> None:
    """Examine what an update says of itself, before any byte of it is taken.

    Raises:
        UpdateRefused: weight, step count, metrics, sections or size are impossible.
    """
    if not 1 <= update.num_examples <= limits.max_num_examples:
        raise UpdateRefused(
            f"num_examples is {update.num_examples}; it must lie in 1 to {limits.max_num_examples}"
        )
    max_steps = update.num_examples * limits.max_steps_per_example
    if not 0 <= update.num_steps <= max_steps:
        raise UpdateRefused(f"num_steps is {update.num_steps}; it must lie in 0 to {max_steps}")
    for name, value in update.metrics.items():
        if name not in METRIC_NAMES or not math.isfinite(value):
            raise UpdateRefused(
                f"metric {name!r} is {value}; metrics are finite numbers named "
                f"{', '.join(sorted(METRIC_NAMES))}"
            )
    names = [section.name for section in update.sections]
    if names != [MODEL_SECTION] or update.sections[0].size_bytes != update.size_bytes:
        raise UpdateRefused(
            f"the payload of {update.size_bytes} bytes has sections {names}; it must hold "
            f"{MODEL_SECTION!r} alone, of the same size"
        )
    if not 0 < update.size_bytes <= base.layout.size_bytes + _HEADER_SLACK_BYTES:
        raise UpdateRefused(
            f"the payload has {update.size_bytes} bytes; the model has {base.layout.size_bytes}"
        )


def examine_content(
    received: StateFile,
    *,
    base: StateFile,
    kinds: Mapping[str, EntryKind],
    limits: AdmissionLimits,
    num_steps: int,
) -> None:
    """Examine every tensor of an update against the model it began from, block by block.

    Raises:
        UpdateRefused: keys, shapes or dtypes differ, a value isn't finite, a counter or a fixed
            entry is impossible, or the delta's norm is beyond the cap.
    """
    _examine_layout(received, base)
    received_reader, base_reader = BlockReader(), BlockReader()
    squares = 0.0
    for block in blocks_of(base.layout):
        values = received_reader.read(received, block)
        reference = base_reader.read(base, block)
        where = f"tensor {block.name!r}"
        kind = kinds[block.name]
        if kind is EntryKind.COUNTER:
            advance = values - reference
            if bool((advance < 0).any()) or bool((advance > num_steps).any()):
                raise UpdateRefused(
                    f"{where} counts {values.tolist()} from {reference.tolist()}, "
                    f"which {num_steps} local steps can't"
                )
        elif kind is EntryKind.FIXED:
            if not torch.equal(values, reference):
                raise UpdateRefused(f"{where} must stay as it was sent")
        else:
            square_sum = _delta_square_sum(values, reference)
            if not math.isfinite(square_sum):
                _examine_finite(block, values)
                square_sum = _delta_square_sum(values.double(), reference.double())
            if kind is EntryKind.PARAMETER:
                squares += square_sum
            elif block.name.endswith("running_var") and bool((values < 0).any()):
                raise UpdateRefused(f"{where} holds a negative variance: {values.min().item():.6g}")
    norm = math.sqrt(squares)
    if not norm <= limits.max_delta_norm:
        raise UpdateRefused(
            f"the update is {norm:.6g} away from the global model (L2 norm); "
            f"the round's cap is {limits.max_delta_norm:.6g}"
        )


def _examine_layout(received: StateFile, base: StateFile) -> None:
    ours, theirs = base.layout.entries, received.layout.entries
    if missing := sorted(ours.keys() - theirs.keys()):
        raise UpdateRefused(f"tensors are missing: {_listed(missing)}")
    if unknown := sorted(theirs.keys() - ours.keys()):
        raise UpdateRefused(f"the model has no tensors named {_listed(unknown)}")
    for name, entry in ours.items():
        sent = theirs[name]
        if sent.shape != entry.shape or sent.dtype != entry.dtype:
            raise UpdateRefused(
                f"tensor {name!r} has shape {list(sent.shape)} and dtype {sent.dtype}; "
                f"the model has {list(entry.shape)} and {entry.dtype}"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _delta_square_sum(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the squared norm of a block's delta; NaN or infinite if a value isn't finite.

    In float32 where that is wide enough: it guards against the absurd and needn't be exact. One
    pass instead of two, since a sum over finite numbers that overflows is looked at again.
    """
    if values.dtype not in (torch.float32, torch.float64):
        values, reference = values.float(), reference.float()
    delta = torch.sub(values, reference)
    return float(torch.dot(delta, delta))


def _examine_finite(block: Block, values: torch.Tensor) -> None:
    bad = torch.nonzero(~torch.isfinite(values)).flatten()
    if len(bad):
        raise UpdateRefused(
            f"tensor {block.name!r} holds {values[bad[0]].item()} at element "
            f"{block.begin + int(bad[0])} ({len(bad)} non-finite values in elements "
            f"{block.begin} to {block.begin + block.count - 1})"
        )
