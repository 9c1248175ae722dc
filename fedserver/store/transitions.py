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


def insert_attempt(connection: Connection, opened: Attempt, happened: Event) -> None:
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
            "started_at": happened.at,
            "opened_s": read_clock(connection, opened.run_id),
        },
    )
    insert_orders(connection, opened, opened.orders)
    add_events(connection, opened.run_id, [happened])


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
    at: float,
    **values: object,
) -> None:
    """End an attempt without a model: nothing of what it had counts.

    That is what came into it, and the orders given in it; those of earlier rounds go on.
    """
    finished_s = read_clock(connection, ending.run_id)
    move_attempt(connection, ending, round_event, finished_at=at, finished_s=finished_s, **values)
    for state, where in (
        (OrderState.OPEN, of_attempt(schema.orders, ending)),
        (OrderState.STORED, (came_into(ending),)),
    ):
        move_orders(connection, *where, state=state, order_event=OrderEvent.ABANDON, at=at)


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
    happened = []
    for row in rows:
        move_order(connection, row.order_id, OrderState.OPEN, OrderEvent.MISS, ended_at=at)
        happened.append(
            Event(
                kind=IncidentKind.ORDER_STALE,
                at=at,
                round_number=opened.round_number,
                attempt=opened.attempt,
                client_id=row.client_id,
                is_incident=True,
                fields={"given_in": row.round},
            )
        )
    add_events(connection, opened.run_id, happened)


def move_orders(
    connection: Connection,
    *where: ColumnElement[bool],
    state: OrderState,
    order_event: OrderEvent,
    at: float,
) -> None:
    """Apply an event that ends them to all orders in `state` that `where` picks."""
    connection.execute(
        update(schema.orders)
        .where(*where, schema.orders.c.state == state)
        .values(state=next_order_state(state, order_event), ended_at=at)
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
    happened: Event,
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
    assert happened.round_number is not None
    suspension = (after_strike if is_strike else after_exclusion)(
        None if row is None else read_suspension(row),
        client_id=client_id,
        round_number=happened.round_number,
        reason=reason,
    )
    values = asdict(suspension) | {"run_id": run_id}
    connection.execute(
        sqlite_insert(table)
        .values(values)
        .on_conflict_do_update(index_elements=["run_id", "client_id"], set_=values)
    )
    back_in = {"suspended_until": suspension.suspended_until}
    return replace(happened, fields={**happened.fields, **back_in})


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
    for one in exclusions:
        order_id, reason = one.order_id, one.refusal.reason
        ended_at = one.happened.at
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
            one.refusal.evidence,
            kept_bytes=one.kept_bytes,
            at=ended_at,
        )
        happened = suspend_client(
            *(connection, screened.run_id, one.happened),
            client_id=one.client_id,
            reason=reason,
            is_strike=False,
        )
        add_events(connection, screened.run_id, [happened])


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
    """Return how an order ended without an update that counts; None while it goes on.

    An attempt that ends ABANDONS its orders at the moment of its own end.
    """
    orders, updates, rounds = schema.orders, schema.updates, schema.rounds
    was_in = (rounds.c.run_id == orders.c.run_id) & (
        (rounds.c.round == func.coalesce(updates.c.round, orders.c.round))
        & (rounds.c.attempt == func.coalesce(updates.c.attempt, orders.c.attempt))
    )
    row = connection.execute(
        select(orders.c.state, orders.c.ended_at, rounds.c.phase, rounds.c.finished_at)
        .select_from(orders)
        .outerjoin(updates, updates.c.order_id == orders.c.order_id)
        .join(rounds, was_in)
        .where(orders.c.order_id == order_id)
    ).one()
    if row.state in (OrderState.OPEN, OrderState.STORED):
        return None
    if row.state == OrderState.LATE:
        return OrderEnd.ROUND_CLOSED
    if row.state != OrderState.ABANDONED:
        return OrderEnd.OTHER
    ended_with_attempt = {
        Phase.FAILED: OrderEnd.ATTEMPT_FAILED,
        Phase.ABANDONED: OrderEnd.TAKEN_BACK,
    }
    if row.ended_at == row.finished_at and row.phase in ended_with_attempt:
        return ended_with_attempt[Phase(row.phase)]
    return OrderEnd.GIVEN_UP


def add_events(
    connection: Connection,
    run_id: str,
    happened: Iterable[Event],
    *,
    report_key: str | None = None,
) -> None:
    """Record events in their order."""
    for one in happened:
        connection.info[RECORDED].append(one)
        connection.execute(
            insert(schema.events),
            {
                "run_id": run_id,
                "kind": one.kind,
                "at": one.at,
                "round": one.round_number,
                "attempt": one.attempt,
                "client_id": one.client_id,
                "is_incident": one.is_incident,
                "fields": dict(one.fields),
                "report_key": report_key,
            },
        )
