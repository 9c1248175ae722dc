"""Runs and the sessions of their clients."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from fedserver.phases import OrderEvent, OrderState, Phase
from fedserver.records import Event, Run, RunState, Session
from fedserver.store import schema
from fedserver.store.database import Database
from fedserver.store.rows import measured, read_run
from fedserver.store.run_clock import clock_values
from fedserver.store.transitions import add_events, move_orders


class Runs(Database):
    """Which runs there were, and who is connected to the one that goes on."""

    def latest_run(self, *, number: int | None = None) -> Run | None:
        """Return the run begun last, or the one of that number; None if there is none."""
        query = select(schema.runs).order_by(schema.runs.c.number.desc()).limit(1)
        if number is not None:
            query = query.where(schema.runs.c.number == number)
        with self.reading() as connection:
            row = connection.execute(query).first()
            return None if row is None else read_run(row)

    def all_runs(self) -> list[Run]:
        """Return every run by number."""
        with self.reading() as connection:
            rows = connection.execute(select(schema.runs).order_by(schema.runs.c.number)).all()
            return [read_run(row) for row in rows]

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
        with self.writing() as connection:
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

    def end_run(self, run_id: str, state: RunState, happened: Event) -> None:
        """Record that a run is over; orders that are still open end with it."""
        ending = OrderEvent.MISS if state is RunState.FINISHED else OrderEvent.ABANDON
        with self.writing() as connection:
            move_orders(
                connection,
                schema.orders.c.run_id == run_id,
                state=OrderState.OPEN,
                order_event=ending,
                at=happened.at,
            )
            connection.execute(
                update(schema.runs)
                .where(schema.runs.c.run_id == run_id)
                .values(state=state, finished_at=happened.at)
            )
            add_events(connection, run_id, [happened])

    def save_session(self, run_id: str, session: Session) -> None:
        """Record a session, or what is new of a known one."""
        values = asdict(session) | {"run_id": run_id}
        # Of use only while they run: a server that starts again doesn't need to know them.
        del values["processes"]
        with self.writing() as connection:
            connection.execute(
                sqlite_insert(schema.sessions)
                .values(values)
                .on_conflict_do_update(index_elements=["session_id"], set_=values)
            )

    def remove_session(self, session_id: str) -> None:
        """Forget a session that another one has replaced."""
        with self.writing() as connection:
            connection.execute(
                schema.sessions.delete().where(schema.sessions.c.session_id == session_id)
            )

    def load_sessions(self, run_id: str) -> list[Session]:
        """Return the sessions of a run."""
        with self.reading() as connection:
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

    def best_model(self, run_id: str) -> str | None:
        """Return the digest of the run's model with the highest accuracy, the earliest of equals.

        None while no model was evaluated.
        """
        table, accuracy = schema.rounds, measured("accuracy")
        with self.reading() as connection:
            return connection.execute(
                select(table.c.model_digest)
                .where(table.c.run_id == run_id, table.c.phase == Phase.DONE, accuracy.is_not(None))
                .order_by(accuracy.desc(), table.c.round)
                .limit(1)
            ).scalar()
