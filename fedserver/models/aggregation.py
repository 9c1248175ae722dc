"""What is made of a closed round's updates: the next global model."""

from collections.abc import Sequence

from fedrounds.strategies.blocks import Cohort
from fedrounds.strategies.buffers import Bounded
from fedrounds.strategies.server_step import next_blocks, state_layout
from fedrounds.types import IncidentKind
from fedserver.events import event_of
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.records import Attempt, Event, StoredUpdate, json_number
from fedserver.run_context import RunContext
from fedserver.run_settings import compression_of, strategy_seed
from fedserver.updates.payload import update_file
from fedserver.updates.spool import Spool


def reduce_updates(
    context: RunContext,
    closed: Attempt,
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
    settings = context.settings
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
    closed: Attempt, client_ids: Sequence[int], bounded: Sequence[Bounded]
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
