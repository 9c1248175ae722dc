"""What is made of a closed round: who is screened out, and the next global model."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fedserver.checkpoints import GlobalModel
from fedserver.events import event_of
from fedserver.parts import Parts
from fedserver.records import Exclusion, Refusal, Round, StoredUpdate
from fedserver.screening import norm_band
from fedserver.strategies import Strategy
from fedserver.strategies.blocks import Block, StateFile
from shared.codec import read_layout
from shared.types import IncidentKind
from shared.weights import EntryKind


def screen(
    closed: Round, stored: Sequence[StoredUpdate], *, width: float, trusted: Collection[int]
) -> list[Exclusion]:
    """Return the updates whose norm lies outside of their cohort's band (see `norm_band`).

    A function of what was recorded. `trusted` clients are never excluded, and a `width` of 0
    excludes nobody.
    """
    band = norm_band([one.delta_norm for one in stored], width=width) if width else None
    if band is None:
        return []
    exclusions = []
    for one in stored:
        if band.low <= one.delta_norm <= band.high or one.client_id in trusted:
            continue
        evidence = {
            "norm": one.delta_norm,
            "median": band.median,
            "mad": band.mad,
            "low": band.low,
            "high": band.high,
        }
        reason = (
            f"the update is {one.delta_norm:.6g} away from the global model (L2 norm); its "
            f"cohort's are {band.low:.6g} to {band.high:.6g} (median {band.median:.6g}, median "
            f"absolute deviation {band.mad:.6g})"
        )
        exclusions.append(
            Exclusion(
                order_id=one.update.order_id,
                client_id=one.client_id,
                refusal=Refusal(reason=reason, evidence={"kind": "norm-band", **evidence}),
                kept_bytes=one.update.size_bytes,
                happened=event_of(
                    IncidentKind.UPDATE_EXCLUDED,
                    closed,
                    client_id=one.client_id,
                    is_incident=True,
                    **evidence,
                ),
            )
        )
    return exclusions


def reduce_updates(
    parts: Parts, strategy: Strategy, base: GlobalModel, counted: Sequence[StoredUpdate]
) -> GlobalModel:
    """Write the model that a strategy makes of these updates, in their order.

    Raises:
        NonFiniteAggregate: it holds a NaN or an infinity; nothing is kept.
        OutOfSpace: the disk is full; nothing is kept.
    """
    updates = [
        (parts.spool.path(one.update.order_id, one.update.digest), one.update.num_examples)
        for one in counted
    ]
    return parts.checkpoints.save(base.file, next_model(strategy, base.file, updates, parts.kinds))


def next_model(
    strategy: Strategy,
    base: StateFile,
    counted: Sequence[tuple[Path, int]],
    kinds: Mapping[str, EntryKind],
) -> Iterator[tuple[Block, torch.Tensor]]:
    """Return the blocks of what a strategy makes of these updates, in their order.

    `counted` holds each update's file and its num_examples. Serving a run and verifying it are
    the same arithmetic: this.
    """
    updates = [
        StateFile(path=path, layout=read_layout(path), num_examples=num_examples)
        for path, num_examples in counted
    ]
    return strategy.aggregator(base, updates, kinds)
