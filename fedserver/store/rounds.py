"""Rounds: opened, closed, failed, finished; each step one transaction."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import or_, select, update

from fedserver.records import Event, Exclusion, Round
from fedserver.rounds import OrderEvent, OrderState, Phase, RoundEvent
from fedserver.store import schema
from fedserver.store.book import append_entry, read_verdicts
from fedserver.store.database import Database
from fedserver.store.transitions import (
    add_events,
    exclude_orders,
    forgive_clients,
    in_round,
    insert_round,
    move_orders,
    move_round,
    read_round,
)


class Rounds(Database):
    """The attempts at rounds, the last of which goes on."""

    def latest_round(self, run_id: str) -> Round | None:
        """Return the last attempt at the last round with its orders, None before the first."""
        table = schema.rounds
        with self.reading() as connection:
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
        with self.writing() as connection:
            insert_round(connection, opened, happened)

    def close_round(self, closing: Round, happened: Event) -> None:
        """Close a collecting round: orders still open are LATE from here on."""
        with self.writing() as connection:
            move_round(connection, closing, RoundEvent.CLOSE, closed_at=happened.at)
            move_orders(connection, closing, OrderState.OPEN, OrderEvent.MISS, at=happened.at)
            add_events(connection, closing.run_id, [happened])

    def fail_round(
        self, failing: Round, happened: Event, *, exclusions: Sequence[Exclusion] = ()
    ) -> list[Event]:
        """Give up an attempt; whatever it had stays recorded and counts for nothing.

        Returns the events recorded: those of the exclusions, then `happened`.
        """
        with self.writing() as connection:
            excluded = exclude_orders(connection, failing, exclusions)
            move_round(connection, failing, RoundEvent.FAIL, finished_at=happened.at)
            for state in (OrderState.OPEN, OrderState.STORED):
                move_orders(connection, failing, state, OrderEvent.ABANDON, at=happened.at)
            add_events(connection, failing.run_id, [happened])
        return [*excluded, happened]

    def finish_round(
        self,
        finishing: Round,
        *,
        model_digest: str,
        state_digest: str | None = None,
        next_round: Round | None,
        happened: Sequence[Event],
        exclusions: Sequence[Exclusion] = (),
        client_evaluation: Mapping[str, float] | None = None,
    ) -> list[Event]:
        """Record the next global model, the verdicts, the ledger's entry and the round after.

        Returns the events recorded: those of the exclusions, then `happened`.
        """
        run_id, at = finishing.run_id, happened[0].at
        with self.writing() as connection:
            excluded = exclude_orders(connection, finishing, exclusions)
            move_round(
                connection,
                finishing,
                RoundEvent.FINISH,
                model_digest=model_digest,
                state_digest=state_digest,
                client_evaluation=client_evaluation,
                finished_at=at,
            )
            move_orders(connection, finishing, OrderState.STORED, OrderEvent.COUNT, at=at)
            verdicts = read_verdicts(connection, run_id, finishing.round_number, finishing.attempt)
            forgive_clients(
                connection,
                run_id,
                [one["client"] for one in verdicts if one["verdict"] == OrderState.COUNTED],
            )
            append_entry(
                connection,
                finishing,
                model_digest=model_digest,
                state_digest=state_digest,
                updates=verdicts,
            )
            if next_round is None:
                add_events(connection, run_id, happened)
            else:
                add_events(connection, run_id, happened[:-1])
                insert_round(connection, next_round, happened[-1])
        return [*excluded, *happened]

    def record_evaluation(
        self, evaluated: Round, evaluation: Mapping[str, object], happened: Event
    ) -> None:
        """Record how good the model is that a DONE round produced."""
        with self.writing() as connection:
            connection.execute(
                update(schema.rounds)
                .where(*in_round(schema.rounds, evaluated), schema.rounds.c.phase == Phase.DONE)
                .values(evaluation=dict(evaluation))
            )
            add_events(connection, evaluated.run_id, [happened])

    def unevaluated_rounds(self, run_id: str) -> list[Round]:
        """Return the DONE rounds without an evaluation."""
        table = schema.rounds
        with self.reading() as connection:
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

    def models_let_go(self, run_id: str, digests: Collection[str], *, since_round: int) -> set[str]:
        """Return those of `digests` that only rounds of this run before `since_round` know of.

        They name models and server states. The run's best model stays, with the state that goes
        with it, and whatever another run knows of.
        """
        table = schema.rounds
        named = (
            *(table.c.base_digest, table.c.base_state_digest),
            *(table.c.model_digest, table.c.state_digest),
        )
        with self.reading() as connection:
            rows = connection.execute(
                select(
                    *(table.c.run_id, table.c.round, *named),
                    table.c.evaluation["accuracy"].as_float().label("accuracy"),
                ).where(or_(*(column.in_(digests) for column in named)))
            ).all()
        old = [row for row in rows if row.run_id == run_id and row.round < since_round]
        kept = _blobs_of(row for row in rows if row not in old)
        evaluated = [row for row in rows if row.run_id == run_id and row.accuracy is not None]
        if evaluated:
            best = max(evaluated, key=lambda row: (row.accuracy, -row.round))
            kept |= {best.model_digest, best.state_digest}
        return (set(digests) & _blobs_of(old)) - kept


def _blobs_of(rows: Iterable[Any]) -> set[str | None]:
    """Return the models and server states that rows of `rounds` name."""
    return {
        digest
        for row in rows
        for digest in (
            *(row.base_digest, row.base_state_digest),
            *(row.model_digest, row.state_digest),
        )
    }
