"""Steps that the store's transactions are made of; each works on the caller's connection."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from fedrounds.errors import NotFound
from fedrounds.types import IncidentKind, OrderEnd
from fedserver.phases import (
    OrderEvent,
    OrderState,
    Phase,
    RoundEvent,
    next_order_state,
    next_phase,
)
from fedserver.records import (
    Attempt,
    Event,
    Exclusion,
    HeldState,
    Order,
    OrderRecord,
)
from fedserver.store import schema
from fedserver.store.database import RECORDED
from fedserver.store.rows import read_suspension
from fedserver.store.run_clock import read_clock
from fedserver.suspension import after_exclusion, after_strike

# Made once: putting a statement together takes longer than running it.
_FIND_ORDER = (
    select(schema.orders, schema.updates.c.digest, schema.updates.c.reason)
    .outerjoin(schema.updates, schema.updates.c.order_id == schema.orders.c.order_id)
    .where(schema.orders.c.order_id == bindparam("order_id"))
)
_MOVE_ORDER = update(schema.orders).where(schema.orders.c.order_id == bindparam("moved_id"))


def of_attempt(table: Table, wanted: Attempt) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that pick the rows of one attempt at a round."""
    return (
        table.c.run_id == wanted.run_id,
        table.c.round == wanted.round_number,
        table.c.attempt == wanted.attempt,
    )


def came_into(wanted: Attempt) -> ColumnElement[bool]:
    """Return the condition that picks the orders whose updates came into one attempt."""
    orders, updates = schema.orders, schema.updates
    return (orders.c.run_id == wanted.run_id) & orders.c.order_id.in_(
        select(updates.c.order_id).where(
            updates.c.round == wanted.round_number, updates.c.attempt == wanted.attempt
        )
    )


def insert_attempt(connection: Connection, opened: Attempt, event: Event) -> None:
    """Record a round that begins to collect, with its orders."""
    table = schema.orders
    num_open = connection.scalar(
        select(func.count()).where(
            table.c.run_id == opened.run_id, table.c.state == OrderState.OPEN
        )
    )
    connection.execute(
        insert(schema.rounds),
        {
            "run_id": opened.run_id,
            "round": opened.round_number,
            "attempt": opened.attempt,
            "phase": opened.phase,
            "base_digest": opened.base_digest,
            "base_state_digest": opened.base_state_digest,
            "base_bytes": opened.base_bytes,
            "max_delta_norm": opened.max_delta_norm,
            "adjustments": opened.adjustments.as_json(),
            "num_carried_over": num_open,
            "started_at": event.occurred_at,
            "opened_s": read_clock(connection, opened.run_id),
        },
    )
    insert_orders(connection, opened, opened.orders)
    add_events(connection, opened.run_id, [event])


def insert_orders(connection: Connection, given_in: Attempt, orders: Iterable[Order]) -> None:
    """Record the orders that are given in an attempt."""
    rows = [
        {
            "order_id": order.order_id,
            "run_id": given_in.run_id,
            "round": given_in.round_number,
            "attempt": given_in.attempt,
            "client_id": order.client_id,
            "num_examples": order.num_examples,
            "state": order.state,
        }
        for order in orders
    ]
    # Without any, SQLAlchemy would insert one row of defaults.
    if rows:
        connection.execute(insert(schema.orders), rows)


def move_attempt(
    connection: Connection, moving: Attempt, round_event: RoundEvent, **values: object
) -> None:
    """Apply an event to the phase the database holds, and write `values` beside it."""
    where = of_attempt(schema.rounds, moving)
    phase = Phase(connection.execute(select(schema.rounds.c.phase).where(*where)).scalar_one())
    connection.execute(
        update(schema.rounds).where(*where).values(phase=next_phase(phase, round_event), **values)
    )


def end_attempt(
    connection: Connection,
    ending: Attempt,
    round_event: RoundEvent,
    *,
    order_end: OrderEnd,
    at: float,
    **values: object,
) -> None:
    """End an attempt without a model, and abandon its orders with the cause `order_end`.

    Its orders are those given in it that are still open, and those whose updates came into it.
    Open orders of earlier rounds go on.
    """
    finished_s = read_clock(connection, ending.run_id)
    move_attempt(connection, ending, round_event, finished_at=at, finished_s=finished_s, **values)
    for state, where in (
        (OrderState.OPEN, of_attempt(schema.orders, ending)),
        (OrderState.STORED, (came_into(ending),)),
    ):
        move_orders(
            connection,
            *where,
            state=state,
            order_event=OrderEvent.ABANDON,
            order_end=order_end,
            at=at,
        )


def end_stale_orders(
    connection: Connection, opened: Attempt, stale_before: int, *, at: float
) -> None:
    """End the open orders given before a round, each with an event."""
    table = schema.orders
    rows = connection.execute(
        select(table)
        .where(
            table.c.run_id == opened.run_id,
            table.c.state == OrderState.OPEN,
            table.c.round < stale_before,
        )
        .order_by(table.c.order_id)
    ).all()
    events = []
    for row in rows:
        move_order(
            connection,
            row.order_id,
            OrderState.OPEN,
            OrderEvent.MISS,
            ended_at=at,
            order_end=OrderEnd.ROUND_CLOSED,
        )
        events.append(
            Event(
                kind=IncidentKind.ORDER_STALE,
                occurred_at=at,
                round_number=opened.round_number,
                attempt=opened.attempt,
                client_id=row.client_id,
                is_incident=True,
                fields={"given_in": row.round},
            )
        )
    add_events(connection, opened.run_id, events)


def move_orders(
    connection: Connection,
    *where: ColumnElement[bool],
    state: OrderState,
    order_event: OrderEvent,
    at: float,
    order_end: OrderEnd | None = None,
) -> None:
    """End all orders in `state` that `where` picks; `order_end` is the cause if none counts."""
    connection.execute(
        update(schema.orders)
        .where(*where, schema.orders.c.state == state)
        .values(state=next_order_state(state, order_event), ended_at=at, order_end=order_end)
    )


def move_order(
    connection: Connection,
    order_id: str,
    state: OrderState,
    order_event: OrderEvent,
    **values: object,
) -> OrderState:
    """Apply an event to one order that is in `state`; returns the state that follows."""
    following = next_order_state(state, order_event)
    connection.execute(_MOVE_ORDER, {"moved_id": order_id, "state": following, **values})
    return following


def suspend_client(
    connection: Connection,
    run_id: str,
    event: Event,
    *,
    client_id: int,
    reason: str,
    is_strike: bool = True,
) -> Event:
    """Suspend a client for an event; returns the event with the round the client comes back in.

    For how long: see fedserver.suspension. `is_strike` is False after an exclusion.
    """
    table = schema.standings
    row = connection.execute(
        select(table).where(table.c.run_id == run_id, table.c.client_id == client_id)
    ).first()
    assert event.round_number is not None
    suspension = (after_strike if is_strike else after_exclusion)(
        None if row is None else read_suspension(row),
        client_id=client_id,
        round_number=event.round_number,
        reason=reason,
    )
    values = asdict(suspension) | {"run_id": run_id}
    connection.execute(
        sqlite_insert(table)
        .values(values)
        .on_conflict_do_update(index_elements=["run_id", "client_id"], set_=values)
    )
    back_in = {"suspended_until": suspension.suspended_until}
    return replace(event, fields={**event.fields, **back_in})


def reinstate_clients(connection: Connection, run_id: str, client_ids: Iterable[int]) -> None:
    """End the suspensions of clients, and clear their strikes."""
    table = schema.standings
    connection.execute(
        delete(table).where(table.c.run_id == run_id, table.c.client_id.in_(list(client_ids)))
    )


def hold_update(
    connection: Connection,
    run_id: str,
    order_id: str,
    evidence: Mapping[str, Any],
    *,
    kept_bytes: int,
    at: float,
) -> None:
    """Record that an update is in quarantine."""
    connection.execute(
        insert(schema.quarantine).values(
            order_id=order_id,
            run_id=run_id,
            state=HeldState.HELD,
            evidence=dict(evidence),
            kept_bytes=kept_bytes,
            held_at=at,
        )
    )


def exclude_orders(
    connection: Connection, screened: Attempt, exclusions: Iterable[Exclusion]
) -> None:
    """Take stored updates out of their round, each with its event."""
    for exclusion in exclusions:
        order_id, reason = exclusion.order_id, exclusion.refusal.reason
        ended_at = exclusion.event.occurred_at
        move_order(connection, order_id, OrderState.STORED, OrderEvent.EXCLUDE, ended_at=ended_at)
        connection.execute(
            update(schema.updates)
            .where(schema.updates.c.order_id == order_id)
            .values(reason=reason)
        )
        hold_update(
            connection,
            screened.run_id,
            order_id,
            exclusion.refusal.evidence,
            kept_bytes=exclusion.kept_bytes,
            at=ended_at,
        )
        event = suspend_client(
            connection,
            screened.run_id,
            exclusion.event,
            client_id=exclusion.client_id,
            reason=reason,
            is_strike=False,
        )
        add_events(connection, screened.run_id, [event])


def find_order(connection: Connection, order_id: str) -> OrderRecord:
    """Return what is known of an order.

    Raises:
        NotFound: no such order was ever given.
    """
    row = connection.execute(_FIND_ORDER, {"order_id": order_id}).first()
    if row is None:
        raise NotFound(f"there is no order {order_id!r}; pull work to learn of the open ones")
    return OrderRecord(
        order_id=order_id,
        run_id=row.run_id,
        round_number=row.round,
        attempt=row.attempt,
        client_id=row.client_id,
        state=OrderState(row.state),
        digest=row.digest,
        reason=row.reason,
    )


def find_order_end(connection: Connection, order_id: str) -> OrderEnd | None:
    """Return how an order ended without an update that counts; None while it goes on."""
    orders = schema.orders
    row = connection.execute(
        select(orders.c.state, orders.c.order_end).where(orders.c.order_id == order_id)
    ).one()
    if row.state in (OrderState.OPEN, OrderState.STORED):
        return None
    return OrderEnd.OTHER if row.order_end is None else OrderEnd(row.order_end)


def add_events(
    connection: Connection,
    run_id: str,
    events: Iterable[Event],
    *,
    report_key: str | None = None,
) -> None:
    """Record events in their order."""
    for event in events:
        connection.info[RECORDED].append(event)
        connection.execute(
            insert(schema.events),
            {
                "run_id": run_id,
                "kind": event.kind,
                "at": event.occurred_at,
                "round": event.round_number,
                "attempt": event.attempt,
                "client_id": event.client_id,
                "is_incident": event.is_incident,
                "fields": dict(event.fields),
                "report_key": report_key,
            },
        )
