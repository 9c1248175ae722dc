"""The coordinator's memory: runs, sessions, rounds, orders, updates, events, ledger.

Thread safety: any thread may call any method; writers take turns in the database.
Durability: when a writing method returns, what it wrote survives a loss of power (SQLite in WAL
mode with synchronous=FULL). Each writing method is one transaction: all of it happened or nothing.
Consistency: whatever depends on a phase reads it in the transaction that writes.
Ownership: the caller holds the lock of the state-dir; `read_only` needs no lock.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import DatabaseError

from fedserver import ledger
from fedserver.records import (
    Event,
    OrderRecord,
    Round,
    Run,
    RunState,
    Session,
    StoredUpdate,
    json_number,
)
from fedserver.rounds import OrderEvent, OrderState, Phase, RoundEvent, next_order_state
from fedserver.store import schema
from fedserver.store.transitions import (
    add_events,
    examine_version,
    find_order,
    in_round,
    insert_round,
    move_orders,
    move_round,
    read_round,
    read_run,
    read_update,
    sqlite_engine,
)
from shared.errors import NotFound, StorageDamaged
from shared.types import ClientUpdate


class Store:
    """The tables of one state-dir.

    Raises:
        NotFound: `read_only`, and there is no database.
        WrongSettings: a newer version of this software made the database.
        StorageDamaged: the file isn't a database, or a damaged one.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        if read_only and not path.exists():
            raise NotFound(f"there is no run in {path.parent}; check --state-dir")
        self._path = path
        self._engine = sqlite_engine(path, read_only=read_only)
        try:
            examine_version(self._engine, path, read_only=read_only)
        except DatabaseError as error:
            raise StorageDamaged(
                f"{path} can't be read as this service's database ({error.orig}); nothing was "
                "changed: restore it from a copy, or start with another --state-dir"
            ) from error

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection that sees one state of the database from first read to last."""
        with self._engine.begin() as connection:
            yield connection

    # ---- runs

    def latest_run(self, *, number: int | None = None) -> Run | None:
        """Return the run begun last, or the one of that number; None if there is none."""
        query = select(schema.runs).order_by(schema.runs.c.number.desc()).limit(1)
        if number is not None:
            query = query.where(schema.runs.c.number == number)
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else read_run(row)

    def begin_run(self, settings: Mapping[str, Any]) -> Run:
        """Record a new run, OPEN, with the number after the latest one's."""
        latest = self.latest_run()
        number = 1 if latest is None else latest.number + 1
        run = Run(
            run_id=f"run{number}-{secrets.token_hex(3)}",
            number=number,
            settings=settings,
            state=RunState.OPEN,
        )
        with self._engine.begin() as connection:
            connection.execute(
                insert(schema.runs).values(
                    run_id=run.run_id,
                    number=number,
                    state=run.state,
                    settings=dict(settings),
                    started_at=time.time(),
                )
            )
        return run

    def end_run(self, run_id: str, state: RunState, happened: Event) -> None:
        """Record that a run is over."""
        with self._engine.begin() as connection:
            connection.execute(
                update(schema.runs)
                .where(schema.runs.c.run_id == run_id)
                .values(state=state, finished_at=happened.at)
            )
            add_events(connection, run_id, [happened])

    # ---- sessions

    def save_session(self, run_id: str, session: Session) -> None:
        """Record a session, or what is new of a known one."""
        values = asdict(session) | {"run_id": run_id}
        with self._engine.begin() as connection:
            connection.execute(
                sqlite_insert(schema.sessions)
                .values(values)
                .on_conflict_do_update(index_elements=["session_id"], set_=values)
            )

    def remove_session(self, session_id: str) -> None:
        """Forget a session that another one has replaced."""
        with self._engine.begin() as connection:
            connection.execute(
                schema.sessions.delete().where(schema.sessions.c.session_id == session_id)
            )

    def load_sessions(self, run_id: str) -> list[Session]:
        """Return the sessions of a run."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                select(schema.sessions).where(schema.sessions.c.run_id == run_id)
            ).all()
        return [
            Session(
                session_id=row.session_id,
                instance_key=row.instance_key,
                client_ids=tuple(row.client_ids),
                num_examples=tuple(row.num_examples),
                software_version=row.software_version,
            )
            for row in rows
        ]

    # ---- rounds

    def latest_round(self, run_id: str) -> Round | None:
        """Return the last attempt at the last round with its orders, None before the first."""
        table = schema.rounds
        with self._engine.connect() as connection:
            row = connection.execute(
                select(table)
                .where(table.c.run_id == run_id)
                .order_by(table.c.round.desc(), table.c.attempt.desc())
                .limit(1)
            ).first()
            if row is None:
                return None
            return read_round(connection, row)

    def open_round(self, opened: Round, happened: Event) -> None:
        """Record a round that begins to collect, with its orders."""
        with self._engine.begin() as connection:
            insert_round(connection, opened, happened)

    def close_round(self, closing: Round, happened: Event) -> None:
        """Close a collecting round: orders still open are LATE from here on."""
        with self._engine.begin() as connection:
            move_round(connection, closing, RoundEvent.CLOSE, closed_at=happened.at)
            move_orders(connection, closing, OrderState.OPEN, OrderEvent.MISS, at=happened.at)
            add_events(connection, closing.run_id, [happened])

    def fail_round(self, failing: Round, happened: Event) -> None:
        """Give up an attempt; whatever it had stays recorded and counts for nothing."""
        with self._engine.begin() as connection:
            move_round(connection, failing, RoundEvent.FAIL, finished_at=happened.at)
            for state in (OrderState.OPEN, OrderState.STORED):
                move_orders(connection, failing, state, OrderEvent.ABANDON, at=happened.at)
            add_events(connection, failing.run_id, [happened])

    def finish_round(
        self,
        finishing: Round,
        *,
        model_digest: str,
        counted: Sequence[StoredUpdate],
        next_round: Round | None,
        happened: Sequence[Event],
        client_evaluation: Mapping[str, float] | None = None,
    ) -> None:
        """Record the next global model, the verdicts, the ledger's entry and the round after."""
        run_id = finishing.run_id
        at = happened[0].at
        with self._engine.begin() as connection:
            move_round(
                connection,
                finishing,
                RoundEvent.FINISH,
                model_digest=model_digest,
                client_evaluation=client_evaluation,
                finished_at=at,
            )
            move_orders(connection, finishing, OrderState.STORED, OrderEvent.COUNT, at=at)
            settings, previous = connection.execute(
                select(
                    schema.runs.c.settings,
                    select(schema.ledger.c.digest)
                    .where(schema.ledger.c.run_id == run_id)
                    .order_by(schema.ledger.c.round.desc())
                    .limit(1)
                    .scalar_subquery(),
                ).where(schema.runs.c.run_id == run_id)
            ).one()
            entry = ledger.entry_bytes(
                run_id=run_id,
                round_number=finishing.round_number,
                attempt=finishing.attempt,
                base_digest=finishing.base_digest,
                model_digest=model_digest,
                settings=settings,
                updates=[
                    {
                        "order_id": stored.update.order_id,
                        "client": stored.client_id,
                        "num_examples": stored.update.num_examples,
                        "digest": stored.update.digest,
                        "verdict": OrderState.COUNTED,
                    }
                    for stored in counted
                ],
                previous=previous or ledger.GENESIS,
            )
            connection.execute(
                insert(schema.ledger).values(
                    run_id=run_id,
                    round=finishing.round_number,
                    entry=entry.decode(),
                    digest=ledger.entry_digest(entry),
                )
            )
            if next_round is None:
                add_events(connection, run_id, happened)
            else:
                add_events(connection, run_id, happened[:-1])
                insert_round(connection, next_round, happened[-1])

    def record_evaluation(
        self, evaluated: Round, evaluation: Mapping[str, object], happened: Event
    ) -> None:
        """Record how good the model is that a DONE round produced."""
        with self._engine.begin() as connection:
            connection.execute(
                update(schema.rounds)
                .where(*in_round(schema.rounds, evaluated), schema.rounds.c.phase == Phase.DONE)
                .values(evaluation=dict(evaluation))
            )
            add_events(connection, evaluated.run_id, [happened])

    def unevaluated_rounds(self, run_id: str) -> list[Round]:
        """Return the DONE rounds without an evaluation."""
        table = schema.rounds
        with self._engine.connect() as connection:
            rows = connection.execute(
                select(table)
                .where(
                    table.c.run_id == run_id,
                    table.c.phase == Phase.DONE,
                    table.c.evaluation.is_(None),
                )
                .order_by(table.c.round)
            ).all()
            return [read_round(connection, row) for row in rows]

    # ---- orders and updates

    def find_order(self, order_id: str) -> OrderRecord:
        """Return what is known of an order.

        Raises:
            NotFound: no such order was ever given.
        """
        with self._engine.connect() as connection:
            return find_order(connection, order_id)

    def last_counted_orders(self, run_id: str) -> dict[int, str]:
        """Return each client's last COUNTED order."""
        table = schema.orders
        with self._engine.connect() as connection:
            rows = connection.execute(
                select(table.c.client_id, table.c.order_id)
                .where(table.c.run_id == run_id, table.c.state == OrderState.COUNTED)
                .order_by(table.c.round)
            ).all()
        return {row.client_id: row.order_id for row in rows}

    def end_order(
        self,
        run_id: str,
        received: ClientUpdate,
        order_event: OrderEvent,
        describe: Callable[[OrderState], Event],
        *,
        reason: str | None = None,
        handed_out_at: float | None = None,
    ) -> tuple[OrderState, Event | None]:
        """Apply STORE or REFUSE with the update it rests on, if the order is still open.

        Returns the state the order is in afterwards and the event recorded, made by `describe`.
        Where the order had ended before, it stays as it is: a first update that came too late is
        put on record, and anything else changes nothing and is no event.
        """
        with self._engine.begin() as connection:
            order = find_order(connection, received.order_id)
            state = order.state
            if order.digest is not None:
                return state, None
            at = time.time()
            if state is OrderState.OPEN:
                state = next_order_state(state, order_event)
                connection.execute(
                    update(schema.orders)
                    .where(schema.orders.c.order_id == received.order_id)
                    .values(
                        state=state,
                        handed_out_at=handed_out_at,
                        ended_at=None if state is OrderState.STORED else at,
                    )
                )
            metrics = {name: json_number(value) for name, value in received.metrics.items()}
            values = asdict(received) | {"metrics": metrics, "received_at": at, "reason": reason}
            connection.execute(insert(schema.updates).values(values))
            happened = describe(state)
            add_events(connection, run_id, [happened])
            return state, happened

    def abandon_order(self, run_id: str, order_id: str, happened: Event) -> bool:
        """Give an open order up; returns whether it was still open."""
        with self._engine.begin() as connection:
            state = find_order(connection, order_id).state
            if state is not OrderState.OPEN:
                return False
            connection.execute(
                update(schema.orders)
                .where(schema.orders.c.order_id == order_id)
                .values(
                    state=next_order_state(state, OrderEvent.ABANDON),
                    ended_at=happened.at,
                )
            )
            add_events(connection, run_id, [happened])
            return True

    def stored_updates(self, collected: Round) -> list[StoredUpdate]:
        """Return what a round rests on, in the order of aggregation: by client id."""
        orders, updates = schema.orders, schema.updates
        with self._engine.connect() as connection:
            rows = connection.execute(
                select(orders.c.client_id, updates)
                .join(updates, updates.c.order_id == orders.c.order_id)
                .where(
                    *in_round(orders, collected),
                    orders.c.state.in_([OrderState.STORED, OrderState.COUNTED]),
                )
                .order_by(orders.c.client_id, orders.c.order_id)
            ).all()
        return [StoredUpdate(client_id=row.client_id, update=read_update(row)) for row in rows]

    # ---- events

    def add_events(
        self, run_id: str, happened: Iterable[Event], *, report_key: str | None = None
    ) -> bool:
        """Record events; with a `report_key` known already, nothing. Returns whether it did."""
        with self._engine.begin() as connection:
            if report_key is not None and connection.scalar(
                select(schema.events.c.sequence).where(schema.events.c.report_key == report_key)
            ):
                return False
            add_events(connection, run_id, happened, report_key=report_key)
            return True
