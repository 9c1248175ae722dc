"""What is made of a closed round: who is screened out, and the next global model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedserver.events import event_of
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.records import Event, Exclusion, Refusal, Round, StoredUpdate, json_number
from fedserver.run_context import RunContext
from fedserver.strategies.blocks import Cohort, StateFile
from fedserver.strategies.buffers import Bounded
from fedserver.strategies.packed import locate_packed
from fedserver.strategies.step import next_blocks, state_layout
from fedserver.updates.admission import HEADER_SLACK_BYTES
from fedserver.updates.screening import Before, Outlier, outliers
from fedserver.updates.spool import Spool
from shared.codec import read_layout
from shared.payloads import read_payload
from shared.seeds import derive_seed
from shared.types import (
    MODEL_SECTION,
    NO_COMPRESSION,
    Compression,
    Encoding,
    EntryKind,
    IncidentKind,
)


def screen(
    closed: Round,
    stored: Sequence[StoredUpdate],
    *,
    before: Before,
    settings: Mapping[str, Any],
    base: GlobalModel,
    trusted: Collection[int],
) -> list[Exclusion]:
    """Return the updates of a closed round that are too long (see fedserver.updates.screening).

    A function of what is recorded: `before` holds the updates that counted in earlier rounds (see
    `compared_rounds`), `settings` are the run's, `base` is the model that the round began with.
    `trusted` clients are never excluded, and a band of width 0 excludes nobody.
    """
    width = settings["norm_band"] * closed.adjustments.norm_band_factor
    if not width:
        return []
    found = outliers(
        stored,
        before,
        round_number=closed.round_number,
        settings=settings,
        width=width,
        model_norm=base.parameter_norm,
    )
    return [_exclusion(closed, one) for one in found if one.update.client_id not in trusted]


def _exclusion(closed: Round, found: Outlier) -> Exclusion:
    """Return the exclusion of an outlier, with the numbers that show it."""
    evidence = {
        "norm": found.norm,
        "bound": found.bound,
        "typical": found.typical,
        "width": found.width,
        "compared": found.num_compared,
    }
    reason = (
        f"the update is {found.norm:.6g} away from the global model (L2 norm); for this client's "
        f"work {found.typical:.6g} is usual (by {found.num_compared} updates of others), and at "
        f"most {found.width:.3g} times that is admitted, which is {found.bound:.6g}"
    )
    client_id = found.update.client_id
    return Exclusion(
        order_id=found.update.update.order_id,
        client_id=client_id,
        refusal=Refusal(reason=reason, evidence={"kind": "norm-band", **evidence}),
        kept_bytes=found.update.update.size_bytes,
        happened=event_of(
            IncidentKind.UPDATE_EXCLUDED,
            closed,
            client_id=client_id,
            is_incident=True,
            **evidence,
        ),
    )


def reduce_updates(
    context: RunContext,
    closed: Round,
    base: GlobalModel,
    counted: Sequence[StoredUpdate],
    *,
    spool: Spool,
    checkpoints: Checkpoints,
) -> tuple[GlobalModel, list[Event]]:
    """Write the model, and the server state, that a strategy makes of a closed round's updates.

    Returns:
        The model, and an incident for each client of whose update an entry was bounded.

    Raises:
        NonFiniteAggregate: it holds a NaN or an infinity; nothing is kept.
        UnfitCohort: the strategy can't be applied to these updates.
        OutOfSpace: the disk is full; nothing is kept.
    """
    settings = context.run.settings
    cohort = Cohort(
        base=base.file,
        updates=[
            update_file(
                spool.path(one.update.order_id, one.update.digest),
                base=base.file,
                kinds=context.kinds,
                compression=compression_of(settings, one.update.encoding),
                sections=[(each.name, each.size_bytes) for each in one.update.sections],
                num_examples=one.update.num_examples,
                num_steps=one.update.num_steps,
                global_loss=one.update.metrics.get("global_loss"),
                own_base=None if one.own_base is None else checkpoints.path(one.own_base),
                staleness=one.staleness,
            )
            for one in counted
        ],
        kinds=context.kinds,
        seed=strategy_seed(settings, closed.round_number, closed.attempt),
        ties=context.ties,
    )
    server_state = None if base.server_state is None else base.server_state.file
    bounded: list[Bounded] = []
    model = checkpoints.save(
        base.file,
        next_blocks(context.strategy, cohort, server_state, on_bounded=bounded.append),
        state_layout=state_layout(context.strategy, cohort),
    )
    return model, _bounded_events(closed, [one.client_id for one in counted], bounded)


def _bounded_events(
    closed: Round, client_ids: Sequence[int], bounded: Sequence[Bounded]
) -> list[Event]:
    """Return an incident for each client of whose update an entry was bounded."""
    by_client: dict[int, list[Bounded]] = {}
    for one in bounded:
        by_client.setdefault(client_ids[one.update], []).append(one)
    events = []
    for client_id, found in sorted(by_client.items()):
        worst = min(found, key=lambda one: one.share)
        events.append(
            event_of(
                IncidentKind.BUFFER_BOUNDED,
                closed,
                client_id=client_id,
                is_incident=True,
                tensor=worst.name,
                excess=json_number(worst.excess),
                share=worst.share,
                num_tensors=len(found),
            )
        )
    return events


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
    """Return an update on the disk, made from `base`, with what its client said of it.

    Admitting it, serving a run and verifying it build the same values here; `sections` are names
    and sizes in bytes, the model's first, and `global_loss` may be the name of a number that JSON
    can't hold. `own_base` is the model it began with where that isn't the round's.

    Raises:
        InvalidInput: the bytes aren't those sections, the model's isn't what `compression` makes of
            one, or a header is far longer than the model's.
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
        packed = locate_packed(
            path, model.layout, model=base.layout, kinds=kinds, compression=compression
        )
        model = replace(model, layout=base.layout, base=base, packed=packed)
    return replace(
        model,
        others=files,
        num_examples=num_examples,
        num_steps=num_steps,
        global_loss=None if global_loss is None else float(global_loss),
        staleness=staleness,
    )


def compression_of(settings: Mapping[str, Any], encoding: Encoding | str) -> Compression:
    """Return how an update of a run with these settings was compressed that has this encoding."""
    return replace(run_compression(settings), encoding=Encoding(encoding))


def run_compression(settings: Mapping[str, Any]) -> Compression:
    """Return how a run asks its clients to compress updates."""
    name = settings.get("compression", "none")
    if name == "none":
        return NO_COMPRESSION
    return Compression(
        encoding=Encoding(name),
        block_size=settings["compression_block"],
        fraction=settings["compression_fraction"],
    )


def strategy_seed(settings: Mapping[str, Any], round_number: int, attempt: int) -> int:
    """Return the seed of what a strategy draws in an attempt at a round."""
    return derive_seed(
        settings.get("seed", 0), "strategy", round_number=round_number, attempt=attempt
    )
