"""Steps that the store's transactions are made of; each works on the caller's connection."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Row,
    Table,
    create_engine,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.engine import Engine

from fedserver.records import Event, Order, OrderRecord, Round, Run, RunState
from fedserver.rounds import (
    OrderEvent,
    OrderState,
    Phase,
    RoundEvent,
    next_order_state,
    next_phase,
)
from fedserver.store import schema
from shared.errors import NotFound, WrongSettings
from shared.types import ClientUpdate, Section

_BUSY_TIMEOUT_S = 30


def sqlite_engine(path: Path, *, read_only: bool) -> Engine:
    """Return an engine whose transactions take the write lock at once and survive power loss."""
    mode = "ro" if read_only else "rwc"
    engine = create_engine(
        URL.create(
            "sqlite",
            # A URI, in which # ? and % of a folder's name would have a meaning of their own.
            database=f"file:{quote(str(path))}",
            query={"mode": mode, "uri": "true"},
        ),
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def set_durability(connection: sqlite3.Connection, _: object) -> None:
        # The driver's own transaction control begins too late (at the first write).
        connection.isolation_level = None
        if not read_only:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def examine_version(engine: Engine, path: Path, *, read_only: bool) -> None:
    """Examine the version that an old database is stamped with; make the tables of a new one.

    Raises:
        NotFound: `read_only`, and the database has no tables yet.
        WrongSettings: another version of this software made the database; nothing was changed.
    """
    with engine.begin() as connection:
        if inspect(connection).has_table("about"):
            version = connection.execute(select(schema.about.c.schema_version)).scalar_one()
        elif read_only:
            raise NotFound(f"{path} holds no run yet")
        else:
            version = schema.SCHEMA_VERSION
            schema.metadata.create_all(connection)
            connection.execute(insert(schema.about).values(schema_version=version))
        if version < schema.SCHEMA_VERSION:
            raise WrongSettings(
                f"{path} was made by an older version of this software (schema {version}, this one "
                f"writes {schema.SCHEMA_VERSION}); look at it with that version, or begin in "
                "another --state-dir"
            )
        if version > schema.SCHEMA_VERSION:
            raise WrongSettings(
                f"{path} was made by a newer version of this software (schema {version}, "
                f"this one knows {schema.SCHEMA_VERSION}); update the software"
            )


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
        insert(schema.rounds).values(
            **key,
            phase=opened.phase,
            base_digest=opened.base_digest,
            max_delta_norm=opened.max_delta_norm,
            started_at=happened.at,
        )
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


def move_orders(
    connection: Connection, moving: Round, state: OrderState, order_event: OrderEvent, *, at: float
) -> None:
    """Apply an event that ends them to all the round's orders in `state`."""
    connection.execute(
        update(schema.orders)
        .where(*in_round(schema.orders, moving), schema.orders.c.state == state)
        .values(state=next_order_state(state, order_event), ended_at=at)
    )


def find_order(connection: Connection, order_id: str) -> OrderRecord:
    """Return what is known of an order.

    Raises:
        NotFound: no such order was ever given.
    """
    orders, updates = schema.orders, schema.updates
    row = connection.execute(
        select(orders, updates.c.digest, updates.c.reason)
        .outerjoin(updates, updates.c.order_id == orders.c.order_id)
        .where(orders.c.order_id == order_id)
    ).first()
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
            insert(schema.events).values(
                run_id=run_id,
                kind=one.kind,
                at=one.at,
                round=one.round_number,
                attempt=one.attempt,
                client_id=one.client_id,
                is_incident=one.is_incident,
                fields=dict(one.fields),
                report_key=report_key,
            )
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
        model_digest=row.model_digest,
        orders=tuple(
            Order(order_id=one.order_id, client_id=one.client_id, state=OrderState(one.state))
            for one in rows
        ),
    )


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
