"""Steps that the store's transactions are made of; each works on the caller's connection."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Table,
    bindparam,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from fedserver.records import (
    Adjustments,
    Event,
    Exclusion,
    HeldState,
    HeldUpdate,
    Order,
    OrderRecord,
    Refusal,
    Round,
    Run,
    RunState,
    Standing,
)
from fedserver.rounds import (
    OrderEvent,
    OrderState,
    Phase,
    RoundEvent,
    next_order_state,
    next_phase,
)
from fedserver.standing import strike
from fedserver.store import schema
from shared.errors import NotFound
from shared.types import ClientUpdate, Section

# Made once: putting a statement together takes longer than running it.
_FIND_ORDER = (
    select(schema.orders, schema.updates.c.digest, schema.updates.c.reason)
    .outerjoin(schema.updates, schema.updates.c.order_id == schema.orders.c.order_id)
    .where(schema.orders.c.order_id == bindparam("order_id"))
)
_MOVE_ORDER = update(schema.orders).where(schema.orders.c.order_id == bindparam("moved_id"))


def in_round(table: Table, wanted: Round) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that pick the rows of one attempt at a round."""
    return (
        table.c.run_id == wanted.run_id,
        table.c.round == wanted.round_number,
        table.c.attempt == wanted.attempt,
    )


def insert_round(connection: Connection, opened: Round, happened: Event) -> None:
    """Record a round that begins to collect, with its orders."""
    key = {
        "run_id": opened.run_id,
        "round": opened.round_number,
        "attempt": opened.attempt,
    }
    connection.execute(
        insert(schema.rounds),
        key
        | {
            "phase": opened.phase,
            "base_digest": opened.base_digest,
            "base_state_digest": opened.base_state_digest,
            "max_delta_norm": opened.max_delta_norm,
            "adjustments": opened.adjustments.as_json(),
            "started_at": happened.at,
        },
    )
    connection.execute(
        insert(schema.orders),
        [
            key | {"order_id": order.order_id, "client_id": order.client_id, "state": order.state}
            for order in opened.orders
        ],
    )
    add_events(connection, opened.run_id, [happened])


def move_round(
    connection: Connection, moving: Round, round_event: RoundEvent, **values: object
) -> None:
    """Apply an event to the phase the database holds, and write `values` beside it."""
    where = in_round(schema.rounds, moving)
    phase = Phase(connection.execute(select(schema.rounds.c.phase).where(*where)).scalar_one())
    connection.execute(
        update(schema.rounds).where(*where).values(phase=next_phase(phase, round_event), **values)
    )


def end_attempt(
    connection: Connection,
    ending: Round,
    round_event: RoundEvent,
    *,
    at: float,
    **values: object,
) -> None:
    """End an attempt without a model: nothing of what it had counts."""
    move_round(connection, ending, round_event, finished_at=at, **values)
    for state in (OrderState.OPEN, OrderState.STORED):
        move_orders(connection, ending, state, OrderEvent.ABANDON, at=at)


def move_orders(
    connection: Connection, moving: Round, state: OrderState, order_event: OrderEvent, *, at: float
) -> None:
    """Apply an event that ends them to all the round's orders in `state`."""
    connection.execute(
        update(schema.orders)
        .where(*in_round(schema.orders, moving), schema.orders.c.state == state)
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


def strike_client(
    connection: Connection, run_id: str, happened: Event, *, client_id: int, reason: str
) -> Event:
    """Suspend a client that gave cause; returns the event with the round it comes back in."""
    table = schema.standings
    row = connection.execute(
        select(table).where(table.c.run_id == run_id, table.c.client_id == client_id)
    ).first()
    assert happened.round_number is not None
    standing = strike(
        None if row is None else read_standing(row),
        client_id=client_id,
        round_number=happened.round_number,
        reason=reason,
    )
    values = asdict(standing) | {"run_id": run_id}
    connection.execute(
        sqlite_insert(table)
        .values(values)
        .on_conflict_do_update(index_elements=["run_id", "client_id"], set_=values)
    )
    back_in = {"suspended_until": standing.suspended_until}
    return replace(happened, fields={**happened.fields, **back_in})


def forgive_clients(connection: Connection, run_id: str, client_ids: Iterable[int]) -> None:
    """Clear what clients gave cause for."""
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
    connection: Connection, screened: Round, exclusions: Iterable[Exclusion]
) -> list[Event]:
    """Take stored updates out of their round; returns the events recorded."""
    recorded = []
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
        happened = strike_client(
            connection, screened.run_id, one.happened, client_id=one.client_id, reason=reason
        )
        add_events(connection, screened.run_id, [happened])
        recorded.append(happened)
    return recorded


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


def add_events(
    connection: Connection,
    run_id: str,
    happened: Iterable[Event],
    *,
    report_key: str | None = None,
) -> None:
    """Record events in their order."""
    for one in happened:
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


def read_round(connection: Connection, row: Row[Any]) -> Round:
    """Return the attempt that a row of `rounds` holds, with its orders by client id."""
    orders = schema.orders
    rows = connection.execute(
        select(orders.c.order_id, orders.c.client_id, orders.c.state)
        .where(
            orders.c.run_id == row.run_id,
            orders.c.round == row.round,
            orders.c.attempt == row.attempt,
        )
        .order_by(orders.c.client_id)
    ).all()
    return Round(
        run_id=row.run_id,
        round_number=row.round,
        attempt=row.attempt,
        phase=Phase(row.phase),
        base_digest=row.base_digest,
        max_delta_norm=row.max_delta_norm,
        base_state_digest=row.base_state_digest,
        model_digest=row.model_digest,
        state_digest=row.state_digest,
        adjustments=read_adjustments(row.adjustments),
        adjustments_after=read_adjustments(row.adjustments_after or {}),
        orders=tuple(
            Order(order_id=one.order_id, client_id=one.client_id, state=OrderState(one.state))
            for one in rows
        ),
    )


def read_adjustments(values: Mapping[str, Any]) -> Adjustments:
    """Return the adjustments that a column of `rounds` holds."""
    try:
        return Adjustments(**values)
    except TypeError as error:
        raise ValueError(f"adjustments {values!r}: {error}") from error


def read_run(row: Row[Any]) -> Run:
    """Return the run that a row of `runs` holds."""
    return Run(
        run_id=row.run_id, number=row.number, settings=row.settings, state=RunState(row.state)
    )


def read_update(row: Row[Any]) -> ClientUpdate:
    """Return the update that a row of `updates` holds."""
    return ClientUpdate(
        order_id=row.order_id,
        digest=row.digest,
        size_bytes=row.size_bytes,
        sections=tuple(Section(**section) for section in row.sections),
        num_examples=row.num_examples,
        num_steps=row.num_steps,
        metrics=row.metrics,
    )


def read_standing(row: Row[Any]) -> Standing:
    """Return the standing that a row of `standings` holds."""
    return Standing(
        client_id=row.client_id,
        strikes=row.strikes,
        suspended_until=row.suspended_until,
        reason=row.reason,
    )


def read_held(row: Row[Any]) -> HeldUpdate:
    """Return the update that a row of `quarantine` joined with updates and orders holds."""
    return HeldUpdate(
        order_id=row.order_id,
        digest=row.digest,
        run_id=row.run_id,
        client_id=row.client_id,
        round_number=row.round,
        verdict=OrderState(row.verdict),
        state=HeldState(row.state),
        refusal=Refusal(reason=row.reason or "", evidence=row.evidence),
        kept_bytes=row.kept_bytes,
        held_at=row.held_at,
    )
