"""Runs and the sessions of their clients."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from fedrounds.types import OrderEnd
from fedserver.phases import OrderEvent, OrderState
from fedserver.records import Event, Run, RunState, Session
from fedserver.store import schema
from fedserver.store.rows import read_run
from fedserver.store.run_clock import clock_values
from fedserver.store.tables import D_co, Tables, reads, writes
from fedserver.store.transitions import add_events, move_orders


class Runs(Tables[D_co]):
    """The runs of a state-dir, and the sessions of their clients."""

    @reads
    def latest_run(self, connection: Connection, *, number: int | None = None) -> Run | None:
        """Return the latest run, or the run with that number; None if there is none."""
        query = select(schema.runs).order_by(schema.runs.c.number.desc()).limit(1)
        if number is not None:
            query = query.where(schema.runs.c.number == number)
        row = connection.execute(query).first()
        return None if row is None else read_run(row)

    @reads
    def all_runs(self, connection: Connection) -> list[Run]:
        """Return all runs, ordered by number."""
        rows = connection.execute(select(schema.runs).order_by(schema.runs.c.number)).all()
        return [read_run(row) for row in rows]

    @writes
    def begin_run(self, connection: Connection, settings: Mapping[str, Any]) -> Run:
        """Record a new run, OPEN, with the number after the latest run's."""
        latest = connection.scalar(select(func.max(schema.runs.c.number)))
        number = (latest or 0) + 1
        run = Run(
            run_id=f"run{number}-{secrets.token_hex(3)}",
            number=number,
            settings=settings,
            state=RunState.OPEN,
        )
        connection.execute(
            insert(schema.runs).values(
                run_id=run.run_id,
                number=number,
                state=run.state,
                settings=dict(settings),
                started_at=time.time(),
                **clock_values(),
            )
        )
        return run

    @writes
    def end_run(self, connection: Connection, run_id: str, state: RunState, event: Event) -> None:
        """Record that a run is over; its open orders end with it."""
        is_finished = state is RunState.FINISHED
        move_orders(
            connection,
            schema.orders.c.run_id == run_id,
            state=OrderState.OPEN,
            order_event=OrderEvent.MISS if is_finished else OrderEvent.ABANDON,
            order_end=OrderEnd.ROUND_CLOSED if is_finished else OrderEnd.GIVEN_UP,
            at=event.occurred_at,
        )
        connection.execute(
            update(schema.runs)
            .where(schema.runs.c.run_id == run_id)
            .values(state=state, finished_at=event.occurred_at)
        )
        add_events(connection, run_id, [event])

    @writes
    def save_session(self, connection: Connection, run_id: str, session: Session) -> None:
        """Record a session; a known session is replaced by its new values."""
        values = asdict(session) | {"run_id": run_id}
        # Of use only while they run: a server that starts again doesn't need to know them.
        del values["processes"]
        connection.execute(
            sqlite_insert(schema.sessions)
            .values(values)
            .on_conflict_do_update(index_elements=["session_id"], set_=values)
        )

    @writes
    def remove_session(self, connection: Connection, session_id: str) -> None:
        """Delete a session that another session has replaced."""
        connection.execute(
            schema.sessions.delete().where(schema.sessions.c.session_id == session_id)
        )

    @reads
    def load_sessions(self, connection: Connection, run_id: str) -> list[Session]:
        """Return the sessions of a run."""
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
