"""The ledger's rows: written in the transaction that finishes a round, read to verify them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select, update

from fedserver.ledger import (
    GENESIS,
    LedgerEntry,
    LedgerUpdate,
    RollbackEntry,
    entry_digest,
)
from fedserver.phases import RoundEvent
from fedserver.records import Attempt, AttemptRow, Ledger, LedgerRow
from fedserver.store import schema
from fedserver.store.rows import updates_in
from fedserver.store.tables import D_co, Tables, reads


class LedgerTable(Tables[D_co]):
    """The ledger of every run."""

    @reads
    def read_ledger(self, connection: Connection, run_id: str) -> Ledger:
        """Return a run's entries by round, and its attempts at rounds with their updates."""
        table, rounds = schema.ledger, schema.rounds
        settings, head = connection.execute(
            select(schema.runs.c.settings, schema.runs.c.ledger_head).where(
                schema.runs.c.run_id == run_id
            )
        ).one()
        entries = connection.execute(
            select(table)
            .where(table.c.run_id == run_id)
            .order_by(table.c.round, table.c.attempt, table.c.kind)
        ).all()
        attempts = connection.execute(
            select(rounds)
            .where(rounds.c.run_id == run_id)
            .order_by(rounds.c.round, rounds.c.attempt)
        ).all()
        return Ledger(
            run_id=run_id,
            settings=settings,
            head=head,
            entries=[
                LedgerRow(
                    round_number=row.round,
                    attempt=row.attempt,
                    kind=row.kind,
                    entry=row.entry,
                    digest=row.digest,
                )
                for row in entries
            ],
            attempts=[
                AttemptRow(
                    round_number=row.round,
                    attempt=row.attempt,
                    phase=row.phase,
                    base_digest=row.base_digest,
                    base_state_digest=row.base_state_digest,
                    model_digest=row.model_digest,
                    state_digest=row.state_digest,
                    adjustments=row.adjustments,
                    updates=read_verdicts(connection, run_id, row.round, row.attempt),
                )
                for row in attempts
            ],
        )

    @reads
    def entry_digest(self, connection: Connection, run_id: str, round_number: int) -> str | None:
        """Return the digest of a round's last entry; None while it has none."""
        table = schema.ledger
        return connection.execute(
            select(table.c.digest)
            .where(table.c.run_id == run_id, table.c.round == round_number)
            .order_by(table.c.attempt.desc(), table.c.kind.desc())
            .limit(1)
        ).scalar()


def read_verdicts(
    connection: Connection, run_id: str, round_number: int, attempt: int
) -> list[LedgerUpdate]:
    """Return the updates of an attempt with their verdicts, in the order of aggregation."""
    rows = connection.execute(updates_in(run_id, round_number, attempt)).all()
    return [
        LedgerUpdate(
            order_id=row.order_id,
            client_id=row.client_id,
            num_examples=row.num_examples,
            num_steps=row.num_steps,
            global_loss=row.metrics.get("global_loss"),
            digest=row.digest,
            encoding=row.encoding,
            delta_norm=row.delta_norm,
            verdict=row.state,
            base_digest=None if row.given_in == row.round else row.base_digest,
            staleness=row.round - row.given_in,
            sections=_sections(row.sections),
        )
        for row in rows
    ]


def _sections(sections: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, int], ...]:
    """Return names and sizes in bytes of a payload's sections; nothing if the model is all."""
    if len(sections) < 2:
        return ()
    return tuple((section["name"], section["size_bytes"]) for section in sections)


def append_entry(
    connection: Connection,
    finished: Attempt,
    *,
    model_digest: str,
    state_digest: str | None,
    updates: Sequence[LedgerUpdate],
) -> None:
    """Write the entry of a round that is done, chained to the entry before."""
    settings, previous = _settings_and_head(connection, finished.run_id)
    entry = LedgerEntry(
        run_id=finished.run_id,
        round_number=finished.round_number,
        attempt=finished.attempt,
        base_digest=finished.base_digest,
        base_state_digest=finished.base_state_digest,
        model_digest=model_digest,
        state_digest=state_digest,
        settings=settings,
        adjustments=finished.adjustments.as_json(),
        updates=updates,
        previous=previous,
    )
    _append(connection, finished, RoundEvent.FINISH, entry.to_bytes())


def append_rollback(connection: Connection, bad: Attempt) -> None:
    """Write the entry of a round that is rolled back, chained to the entry before."""
    assert bad.model_digest is not None
    _, previous = _settings_and_head(connection, bad.run_id)
    entry = RollbackEntry(
        run_id=bad.run_id,
        round_number=bad.round_number,
        attempt=bad.attempt,
        base_digest=bad.base_digest,
        model_digest=bad.model_digest,
        previous=previous,
    )
    _append(connection, bad, RoundEvent.ROLL_BACK, entry.to_bytes())


def _settings_and_head(connection: Connection, run_id: str) -> tuple[dict[str, Any], str]:
    settings, head = connection.execute(
        select(schema.runs.c.settings, schema.runs.c.ledger_head).where(
            schema.runs.c.run_id == run_id
        )
    ).one()
    return settings, head or GENESIS


def _append(connection: Connection, attempt: Attempt, kind: RoundEvent, entry: bytes) -> None:
    digest = entry_digest(entry)
    connection.execute(
        insert(schema.ledger).values(
            run_id=attempt.run_id,
            round=attempt.round_number,
            attempt=attempt.attempt,
            kind=kind,
            entry=entry.decode(),
            digest=digest,
        )
    )
    connection.execute(
        update(schema.runs).where(schema.runs.c.run_id == attempt.run_id).values(ledger_head=digest)
    )
