"""The next global model, made from the updates of a closed round."""

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
    """Write the model and the server state that the strategy makes of a closed round's updates.

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
                spool.path(stored.update.order_id, stored.update.digest),
                base=base.file,
                kinds=context.kinds,
                compression=compression_of(settings, stored.update.encoding),
                sections=[(section.name, section.size_bytes) for section in stored.update.sections],
                num_examples=stored.update.num_examples,
                num_steps=stored.update.num_steps,
                global_loss=stored.update.metrics.get("global_loss"),
                own_base=None if stored.own_base is None else checkpoints.path(stored.own_base),
                staleness=stored.staleness,
            )
            for stored in counted
        ],
        kinds=context.kinds,
        seed=strategy_seed(settings, closed.round_number, closed.attempt),
        ties=context.ties,
        variances=context.variances,
    )
    server_state = None if base.server_state is None else base.server_state.file
    bounded: list[Bounded] = []
    model = checkpoints.save(
        base.file,
        next_blocks(context.strategy, cohort, server_state, on_bounded=bounded.append),
        state_layout=state_layout(context.strategy, cohort),
    )
    return model, _bounded_events(closed, [stored.client_id for stored in counted], bounded)


def _bounded_events(
    closed: Attempt, client_ids: Sequence[int], bounded: Sequence[Bounded]
) -> list[Event]:
    """Return an incident for each client of whose update an entry was bounded."""
    by_client: dict[int, list[Bounded]] = {}
    for entry in bounded:
        by_client.setdefault(client_ids[entry.update], []).append(entry)
    events = []
    for client_id, entries in sorted(by_client.items()):
        worst = min(entries, key=lambda entry: entry.share)
        events.append(
            event_of(
                IncidentKind.BUFFER_BOUNDED,
                closed,
                client_id=client_id,
                is_incident=True,
                tensor=worst.name,
                excess=json_number(worst.excess),
                share=worst.share,
                num_tensors=len(entries),
                **({} if worst.impossible is None else {"value": json_number(worst.impossible)}),
            )
        )
    return events
