"""Events as they are recorded, and what later steps ask of them."""

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, select

from fedrounds.types import IncidentKind, RunFailure
from fedserver.records import Attempt, Event
from fedserver.store import schema
from fedserver.store.tables import D_co, Tables, reads, writes
from fedserver.store.transitions import add_events


class Events(Tables[D_co]):
    """The events of every run, in the order in which they were recorded."""

    @writes
    def add_events(
        self,
        connection: Connection,
        run_id: str,
        events: Iterable[Event],
        *,
        report_key: str | None = None,
    ) -> bool:
        """Record events; returns False, and records none, if the `report_key` is known already."""
        if report_key is not None and connection.scalar(
            select(schema.events.c.sequence).where(schema.events.c.report_key == report_key)
        ):
            return False
        add_events(connection, run_id, events, report_key=report_key)
        return True

    @reads
    def last_failure(self, connection: Connection, run_id: str) -> tuple[str, RunFailure | None]:
        """Return why the run's last failed attempt failed: a reason in words, and its kind.

        The reason is empty if no attempt has failed. The kind, which clients get, is None if an
        earlier version recorded the failure.
        """
        events = schema.events
        fields = connection.execute(
            select(events.c.fields)
            .where(events.c.run_id == run_id, events.c.kind == IncidentKind.ROUND_FAILED)
            .order_by(events.c.sequence.desc())
            .limit(1)
        ).scalar()
        if not fields:
            return "", None
        # An attempt that failed under an earlier version doesn't name its kind.
        failure = RunFailure(fields["failure"]) if "failure" in fields else None
        return fields["reason"], failure

    @reads
    def answers(
        self, connection: Connection, ending: Attempt
    ) -> tuple[list[tuple[int, Mapping[str, Any]]], set[int]]:
        """Return the diagnoses that clients reported, and the clients that sent an update.

        A diagnosis is a client id and the incident's fields, in the order of their arrival. Both
        are of this attempt and of those just before it with the same adjustments and base model:
        the first client to give up may end an attempt before the others can report.
        """
        rounds, orders, updates = schema.rounds, schema.orders, schema.updates
        events = schema.events

        def in_attempts(table: Table) -> tuple[ColumnElement[bool], ...]:
            return (table.c.round == ending.round_number, table.c.attempt.in_(alike))

        tried = connection.execute(
            select(rounds.c.attempt, rounds.c.adjustments, rounds.c.base_digest)
            .where(
                rounds.c.run_id == ending.run_id,
                rounds.c.round == ending.round_number,
                rounds.c.attempt <= ending.attempt,
            )
            .order_by(rounds.c.attempt.desc())
        ).all()
        same = (ending.adjustments.as_json(), ending.base_digest)
        alike = [
            row.attempt
            for row in takewhile(lambda row: (row.adjustments, row.base_digest) == same, tried)
        ]
        diagnosed = connection.execute(
            select(events.c.client_id, events.c.fields)
            .where(
                *in_attempts(events),
                events.c.run_id == ending.run_id,
                events.c.kind == IncidentKind.TRAINING_DIAGNOSED,
            )
            .order_by(events.c.sequence)
        ).all()
        updating = connection.execute(
            select(orders.c.client_id)
            .join(updates, updates.c.order_id == orders.c.order_id)
            .where(*in_attempts(updates), orders.c.run_id == ending.run_id)
        ).scalars()
        return [(row.client_id, row.fields) for row in diagnosed], set(updating)
