"""What makes an update bad in itself: checks of the update and of the model it began with.

It is compared with its cohort later, when the round closes: see fedserver.updates.screening.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from fedrounds.errors import InvalidInput
from fedrounds.strategies.blocks import BlockReader, StateFile, blocks_of
from fedrounds.strategies.components import Requirement, no_requirement
from fedrounds.strategies.compressed import validate_compressed
from fedrounds.tensors.codec import Entry, Layout, digest_file
from fedrounds.types import (
    MAX_METRIC,
    METRIC_NAMES,
    MODEL_SECTION,
    NO_COMPRESSION,
    ClientUpdate,
    Compression,
    Encoding,
    EntryKind,
)
from fedserver.records import Refusal, json_number
from fedserver.updates.payload import HEADER_SLACK_BYTES

_MAX_TENSORS_NAMED = 20
_MAX_REASON_CHARACTERS = 1000


class UpdateRefused(InvalidInput):
    """The update must not enter an aggregate; says what is wrong and where, with the evidence.

    The reason is cut to a length that tables and logs bear: text of a client may be in it.
    """

    def __init__(self, reason: str, *, kind: str, **evidence: object) -> None:
        reason = reason[:_MAX_REASON_CHARACTERS]
        super().__init__(reason)
        self.refusal = Refusal(reason=reason, evidence={"kind": kind, **evidence})


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """The bounds that were frozen when the round opened.

    `max_delta_norm` bounds the L2 norm of local minus global over all parameters, `sections` names
    what a payload holds, in this order, and `max_control_norm` bounds the L2 norm of a section
    "control". The model's section may be compressed as `compression` says, or not at all. `unmet`
    says why the strategy can't weigh an update.
    """

    max_num_examples: int
    max_delta_norm: float
    max_steps_per_example: int
    sections: tuple[str, ...] = (MODEL_SECTION,)
    max_control_norm: float = math.inf
    compression: Compression = NO_COMPRESSION
    unmet: Requirement = no_requirement


def validate_header(update: ClientUpdate, base: StateFile, limits: AdmissionLimits) -> None:
    """Validate an update's header, before any byte of its payload is taken.

    Raises:
        UpdateRefused: weight, step count, metrics, encoding, sections or size are impossible, or
            the strategy can't weigh it.
    """
    if not 1 <= update.num_examples <= limits.max_num_examples:
        raise UpdateRefused(
            f"num_examples is {update.num_examples}; it must lie in 1 to {limits.max_num_examples}",
            kind="weight",
            num_examples=update.num_examples,
            max_num_examples=limits.max_num_examples,
        )
    max_steps = update.num_examples * limits.max_steps_per_example
    if not 0 <= update.num_steps <= max_steps:
        raise UpdateRefused(
            f"num_steps is {update.num_steps}; it must lie in 0 to {max_steps}",
            kind="steps",
            num_steps=update.num_steps,
            max_steps=max_steps,
        )
    for name, value in update.metrics.items():
        if name not in METRIC_NAMES or not abs(value) <= MAX_METRIC:
            raise UpdateRefused(
                f"metric {name!r} is {value}; metrics are numbers of at most {MAX_METRIC:g} either "
                f"side of 0, named {', '.join(sorted(METRIC_NAMES))}",
                kind="metrics",
            )
        if name.endswith("accuracy") and not 0 <= value <= 1:
            raise UpdateRefused(
                f"metric {name!r} is {value:g}; a share of right answers lies in 0 to 1",
                kind="metrics",
            )
        if name == "global_examples" and not 1 <= value <= limits.max_num_examples:
            raise UpdateRefused(
                f"metric {name!r} is {value:g}; it must lie in 1 to {limits.max_num_examples}",
                kind="metrics",
            )
    for name, values in update.measurements.items():
        if not all(abs(value) <= MAX_METRIC for value in values):
            raise UpdateRefused(
                f"the measurements {name[:80]!r} hold a value that isn't a number of at most "
                f"{MAX_METRIC:g} either side of 0",
                kind="metrics",
            )
    if reason := limits.unmet(update.num_steps, update.metrics.get("global_loss")):
        raise UpdateRefused(reason, kind="lack")
    if update.encoding not in (Encoding.STATE_DICT, limits.compression.encoding):
        raise UpdateRefused(
            f"the update's encoding is {update.encoding}; this run takes "
            f"{' or '.join(sorted({Encoding.STATE_DICT, limits.compression.encoding}))}",
            kind="encoding",
        )
    names = [section.name for section in update.sections]
    num_bytes = sum(section.size_bytes for section in update.sections)
    if names != list(limits.sections) or num_bytes != update.size_bytes:
        raise UpdateRefused(
            f"the payload of {update.size_bytes} bytes has sections {names} of {num_bytes} bytes; "
            f"it must hold {' and '.join(map(repr, limits.sections))} alone, of the same size",
            kind="sections",
        )
    most_bytes = len(names) * (base.layout.size_bytes + HEADER_SLACK_BYTES)
    if not 0 < update.size_bytes <= most_bytes:
        raise UpdateRefused(
            f"the payload has {update.size_bytes} bytes; the model has {base.layout.size_bytes}",
            kind="size",
            size_bytes=update.size_bytes,
            model_bytes=base.layout.size_bytes,
        )


def validate_section_digests(path: Path, update: ClientUpdate) -> None:
    """Compare the digests that an update gives of its sections with the payload in `path`.

    The payload's own digest is known to be right.

    Raises:
        UpdateRefused: a section has another digest.
    """
    offset = 0
    for section in update.sections:
        if section.digest:
            is_alone = section.size_bytes == update.size_bytes
            digest = (
                update.digest
                if is_alone
                else digest_file(path, offset=offset, size_bytes=section.size_bytes)
            )
            if section.digest != digest:
                raise UpdateRefused(
                    f"section {section.name!r} has the digest {digest}, but the header says "
                    f"{section.digest}",
                    kind="section-digest",
                    section=section.name,
                )
        offset += section.size_bytes


def validate_content(
    received: StateFile,
    *,
    base: StateFile,
    kinds: Mapping[str, EntryKind],
    limits: AdmissionLimits,
) -> float:
    """Validate every tensor of an update against the model it began with, block by block.

    Entries that aren't parameters may hold anything: no update is refused for what a buffer holds.
    The bound on buffers deals with it (see fedrounds.strategies.buffers).

    Returns the L2 norm of local minus global over all parameters.

    Raises:
        UpdateRefused: keys, shapes or dtypes differ, a parameter isn't finite, or the delta's norm
            is beyond the cap.
        InvalidInput: scales or indices of a compressed update are impossible.
    """
    if received.compressed is not None:
        validate_compressed(received.path, received.compressed)
    _validate_entries(received.layout.entries, base.layout.entries)
    received_reader, base_reader = BlockReader(), BlockReader()
    squares = 0.0
    for block in blocks_of(base.layout):
        if kinds[block.name] is not EntryKind.PARAMETER:
            continue
        values = received_reader.read(received, block)
        reference = base_reader.read(base, block)
        square_sum = _delta_square_sum(values, reference)
        if not math.isfinite(square_sum):
            if not bool(torch.isfinite(values).all()):
                raise _non_finite(received, kinds=kinds)
            square_sum = _delta_square_sum(values.double(), reference.double())
        squares += square_sum
    norm = math.sqrt(squares)
    if not norm <= limits.max_delta_norm:
        raise UpdateRefused(
            f"the update is {norm:.6g} away from the global model (L2 norm); the round's cap is "
            f"{limits.max_delta_norm:.6g}; if honest training leads so far, give the server a "
            "larger --max-delta-norm",
            kind="norm-cap",
            norm=json_number(norm),
            cap=limits.max_delta_norm,
        )
    return norm


def validate_control(received: StateFile, *, expected: Layout, limits: AdmissionLimits) -> None:
    """Validate a section "control": by how much a client's control variates change.

    Raises:
        UpdateRefused: its entries aren't those of `expected`, a value isn't finite, or its norm is
            beyond the cap.
    """
    _validate_entries(received.layout.entries, expected.entries)
    reader = BlockReader()
    squares = 0.0
    for block in blocks_of(received.layout):
        values = reader.read(received, block).double()
        squares += float(torch.dot(values, values))
    if not math.isfinite(squares):
        raise _non_finite(received)
    if not math.sqrt(squares) <= limits.max_control_norm:
        raise UpdateRefused(
            f"the control variates change by {math.sqrt(squares):.6g} (L2 norm); the round's cap "
            f"is {limits.max_control_norm:.6g}",
            kind="control-cap",
            norm=math.sqrt(squares),
            cap=limits.max_control_norm,
        )


def _validate_entries(received: Mapping[str, Entry], expected: Mapping[str, Entry]) -> None:
    missing = sorted(expected.keys() - received.keys())
    unknown = sorted(received.keys() - expected.keys())
    if missing or unknown:
        raise UpdateRefused(
            f"tensors are missing: {_listed(missing)}"
            if missing
            else f"the model has no tensors named {_listed(unknown)}",
            kind="keys",
            missing=_listed(missing),
            unknown=_listed(unknown),
        )
    for name, entry in expected.items():
        sent = received[name]
        if sent.shape != entry.shape or sent.dtype != entry.dtype:
            raise UpdateRefused(
                f"tensor {name!r} has shape {list(sent.shape)} and dtype {sent.dtype}; "
                f"the model has {list(entry.shape)} and {entry.dtype}",
                kind="dtype" if sent.shape == entry.shape else "shape",
                tensor=name,
                sent=f"{list(sent.shape)} {sent.dtype}",
                model=f"{list(entry.shape)} {entry.dtype}",
            )


def _listed(names: list[str]) -> str:
    # A name may hold what a terminal obeys.
    shown = ", ".join(repr(name[:80]) for name in names[:5])
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


def _non_finite(
    received: StateFile, *, kinds: Mapping[str, EntryKind] | None = None
) -> UpdateRefused:
    """Return the refusal of an update that holds a NaN or an infinity, after a look at all of it.

    The evidence: for each tensor that does, how many there are and the index of the first in the
    flattened tensor. With the `kinds` of the entries, only parameters count.
    """
    reader = BlockReader()
    bad_tensors: dict[str, dict[str, int]] = {}
    first_value = math.nan
    for block in blocks_of(received.layout):
        if kinds is not None and kinds[block.name] is not EntryKind.PARAMETER:
            continue
        bad = torch.nonzero(~torch.isfinite(reader.read(received, block))).flatten()
        if not len(bad):
            continue
        if not bad_tensors:
            first_value = reader.read(received, block)[bad[0]].item()
        first_index = block.begin + int(bad[0])
        of_tensor = bad_tensors.setdefault(block.name, {"count": 0, "first_index": first_index})
        of_tensor["count"] += len(bad)
    name, numbers = next(iter(bad_tensors.items()))
    others = f", and {len(bad_tensors) - 1} more tensors do" if len(bad_tensors) > 1 else ""
    return UpdateRefused(
        f"tensor {name!r} holds {first_value} at element {numbers['first_index']} "
        f"({numbers['count']} non-finite values){others}",
        kind="non-finite",
        tensors=dict(islice(bad_tensors.items(), _MAX_TENSORS_NAMED)),
    )
