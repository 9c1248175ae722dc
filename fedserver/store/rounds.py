"""Rounds: opened, closed, failed, finished; each step one transaction."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Select, func, or_, select, update

from fedrounds.diagnosis.values import Cause
from fedrounds.goals import Goal
from fedrounds.types import OrderEnd
from fedserver.phases import ForbiddenTransition, OrderEvent, OrderState, Phase, RoundEvent
from fedserver.records import (
    NO_ADJUSTMENTS,
    Adjustments,
    Attempt,
    ClientEvaluation,
    Event,
    Exclusion,
    ModelEvaluation,
    Order,
)
from fedserver.store import schema
from fedserver.store.ledger import append_entry, append_rollback, read_verdicts
from fedserver.store.rows import measured, read_attempt, same_attempt
from fedserver.store.run_clock import read_clock
from fedserver.store.tables import D_co, Tables, reads, writes
from fedserver.store.transitions import (
    add_events,
    came_into,
    end_attempt,
    end_stale_orders,
    exclude_orders,
    insert_attempt,
    insert_orders,
    move_attempt,
    move_orders,
    of_attempt,
    reinstate_clients,
)


class Rounds(Tables[D_co]):
    """The attempts at rounds, the last of which goes on."""

    @reads
    def latest_attempt(self, connection: Connection, run_id: str) -> Attempt | None:
        """Return the attempt from which the run goes on, with its orders; None before the first.

        It is the last attempt at the first round that isn't done, if that attempt began with the
        model of the last done round; else the attempt that ended the last done round. After a
        rollback, attempts of the next round that began with the bad model are passed over so.
        """
        table = schema.rounds
        done = connection.execute(_last_done(run_id)).first()
        tried = connection.execute(
            select(table)
            .where(
                table.c.run_id == run_id,
                table.c.round == (1 if done is None else done.round + 1),
            )
            .order_by(table.c.attempt.desc())
            .limit(1)
        ).first()
        if done is not None and (
            tried is None
            or (tried.base_digest, tried.base_state_digest)
            != (done.model_digest, done.state_digest)
        ):
            return read_attempt(connection, done)
        return None if tried is None else read_attempt(connection, tried)

    @reads
    def latest_round_number(self, connection: Connection, run_id: str) -> int | None:
        """Return the highest number of a round that was ever opened; None before the first."""
        table = schema.rounds
        return connection.execute(
            select(func.max(table.c.round)).where(table.c.run_id == run_id)
        ).scalar()

    @reads
    def phases_of(self, connection: Connection, run_id: str, round_number: int) -> list[Phase]:
        """Return the phases of the attempts at a round, by attempt."""
        table = schema.rounds
        phases = connection.execute(
            select(table.c.phase)
            .where(table.c.run_id == run_id, table.c.round == round_number)
            .order_by(table.c.attempt)
        ).scalars()
        return [Phase(phase) for phase in phases]

    @writes
    def open_round(
        self, connection: Connection, opened: Attempt, event: Event, *, stale_before: int = 0
    ) -> None:
        """Record an attempt that begins to collect, with its orders.

        Open orders that were given before round `stale_before` end LATE.
        """
        end_stale_orders(connection, opened, stale_before, at=event.occurred_at)
        insert_attempt(connection, opened, event)

    @writes
    def add_orders(
        self, connection: Connection, collecting: Attempt, orders: Sequence[Order]
    ) -> None:
        """Record further orders of a round that collects.

        Raises:
            ForbiddenTransition: the round doesn't collect any more; nothing was changed.
        """
        phase = connection.execute(
            select(schema.rounds.c.phase).where(*of_attempt(schema.rounds, collecting))
        ).scalar_one()
        if phase != Phase.COLLECTING:
            raise ForbiddenTransition(f"a round in phase {phase} gives no orders")
        insert_orders(connection, collecting, orders)

    @reads
    def carried_over(self, connection: Connection, current: Attempt) -> list[Attempt]:
        """Return the earlier attempts whose orders go on in `current`, with those orders alone.

        The orders are OPEN, or their updates are STORED to be counted in `current`.
        """
        orders, rounds = schema.orders, schema.rounds
        going_on = [OrderState.OPEN, OrderState.STORED]
        rows = connection.execute(
            select(rounds)
            .distinct()
            .join(orders, same_attempt(orders, rounds))
            .where(orders.c.run_id == current.run_id, orders.c.state.in_(going_on))
            .order_by(rounds.c.round, rounds.c.attempt)
        ).all()
        attempts = [
            read_attempt(connection, row)
            for row in rows
            if (row.round, row.attempt) != (current.round_number, current.attempt)
        ]
        return [
            replace(
                attempt,
                orders=tuple(order for order in attempt.orders if order.state in going_on),
            )
            for attempt in attempts
        ]

    @writes
    def close_round(
        self,
        connection: Connection,
        closing: Attempt,
        event: Event,
        *,
        carries_over: bool = False,
    ) -> None:
        """Close a collecting round; its open orders end LATE, or go on if it `carries_over`.

        From this commit on no update comes into the round: `record_arrival` reads the phase in the
        transaction in which it writes.
        """
        closed_s = read_clock(connection, closing.run_id)
        move_attempt(
            connection, closing, RoundEvent.CLOSE, closed_at=event.occurred_at, closed_s=closed_s
        )
        if not carries_over:
            move_orders(
                connection,
                *of_attempt(schema.orders, closing),
                state=OrderState.OPEN,
                order_event=OrderEvent.MISS,
                order_end=OrderEnd.ROUND_CLOSED,
                at=event.occurred_at,
            )
        add_events(connection, closing.run_id, [event])

    @writes
    def fail_round(
        self,
        connection: Connection,
        failing: Attempt,
        events: Sequence[Event],
        *,
        adjustments_after: Adjustments = NO_ADJUSTMENTS,
        exclusions: Sequence[Exclusion] = (),
        is_base_blamed: bool = False,
    ) -> None:
        """End an attempt as FAILED; its updates stay recorded and don't count.

        `is_base_blamed` says that its base model, which the last DONE round made, is bad.
        """
        at = events[0].occurred_at
        exclude_orders(connection, failing, exclusions)
        end_attempt(
            connection,
            failing,
            RoundEvent.FAIL,
            order_end=OrderEnd.ATTEMPT_FAILED,
            at=at,
            adjustments_after=adjustments_after.as_json(),
        )
        if is_base_blamed:
            done = connection.execute(_last_done(failing.run_id)).one()
            connection.execute(
                update(schema.rounds)
                .where(*of_attempt(schema.rounds, read_attempt(connection, done)))
                .values(alarm=Cause.RECEIVED_MODEL)
            )
        add_events(connection, failing.run_id, events)

    @writes
    def roll_back(
        self,
        connection: Connection,
        bad: Attempt,
        events: Sequence[Event],
        *,
        adjustments_after: Adjustments,
        abandoned: Attempt | None,
    ) -> None:
        """Take a DONE round's model back; the round's base model is the global model again.

        `abandoned` is the attempt that was training from the bad model, None if none was.
        """
        at = events[0].occurred_at
        if abandoned is not None:
            end_attempt(
                connection, abandoned, RoundEvent.ABANDON, order_end=OrderEnd.TAKEN_BACK, at=at
            )
        values = {"adjustments_after": adjustments_after.as_json()}
        move_attempt(connection, bad, RoundEvent.ROLL_BACK, **values)
        append_rollback(connection, bad)
        add_events(connection, bad.run_id, events)

    @writes
    def abandon_round(self, connection: Connection, abandoned: Attempt, event: Event) -> None:
        """End an attempt as ABANDONED because the run stops before it."""
        end_attempt(
            connection,
            abandoned,
            RoundEvent.ABANDON,
            order_end=OrderEnd.RUN_STOPPED,
            at=event.occurred_at,
        )
        add_events(connection, abandoned.run_id, [event])

    @writes
    def finish_round(
        self,
        connection: Connection,
        finishing: Attempt,
        *,
        model_digest: str,
        state_digest: str | None = None,
        next_round: Attempt | None,
        events: Sequence[Event],
        adjustments_after: Adjustments = NO_ADJUSTMENTS,
        exclusions: Sequence[Exclusion] = (),
        client_evaluation: ClientEvaluation | None = None,
        stale_before: int = 0,
    ) -> None:
        """Record the next global model, the verdicts, the ledger's entry and the next round.

        With a `next_round` the last of `events` is of its opening, and open orders that were given
        before round `stale_before` end LATE.
        """
        # The model's file was synced and renamed before this commit, so a DONE row never names a
        # model that a loss of power could take away. What the round replaced is deleted after it.
        run_id, at = finishing.run_id, events[0].occurred_at
        exclude_orders(connection, finishing, exclusions)
        move_attempt(
            connection,
            finishing,
            RoundEvent.FINISH,
            model_digest=model_digest,
            state_digest=state_digest,
            client_evaluation=client_evaluation and client_evaluation.as_json(),
            adjustments_after=adjustments_after.as_json(),
            finished_at=at,
            finished_s=read_clock(connection, run_id),
        )
        move_orders(
            connection,
            came_into(finishing),
            state=OrderState.STORED,
            order_event=OrderEvent.COUNT,
            at=at,
        )
        # The evaluation holds what came of them.
        connection.execute(
            update(schema.updates)
            .where(
                schema.updates.c.measurements.is_not(None),
                schema.updates.c.order_id.in_(
                    select(schema.orders.c.order_id).where(came_into(finishing))
                ),
            )
            .values(measurements=None)
        )
        verdicts = read_verdicts(connection, run_id, finishing.round_number, finishing.attempt)
        reinstate_clients(
            connection,
            run_id,
            [update.client_id for update in verdicts if update.verdict == OrderState.COUNTED],
        )
        append_entry(
            connection,
            finishing,
            model_digest=model_digest,
            state_digest=state_digest,
            updates=verdicts,
        )
        if next_round is None:
            add_events(connection, run_id, events)
            return
        add_events(connection, run_id, events[:-1])
        end_stale_orders(connection, next_round, stale_before, at=at)
        insert_attempt(connection, next_round, events[-1])

    @writes
    def record_evaluation(
        self,
        connection: Connection,
        evaluated: Attempt,
        evaluation: ModelEvaluation,
        event: Event,
        *,
        regression: str | None = None,
    ) -> None:
        """Record the evaluation of a DONE round's model, and its `regression` if it is bad."""
        connection.execute(
            update(schema.rounds)
            .where(*of_attempt(schema.rounds, evaluated), schema.rounds.c.phase == Phase.DONE)
            .values(
                evaluation=evaluation.as_json(),
                # Clients may have reported meanwhile that the model is bad: that stays.
                alarm=schema.rounds.c.alarm if regression is None else regression,
            )
        )
        add_events(connection, evaluated.run_id, [event])

    @reads
    def unevaluated_rounds(self, connection: Connection, run_id: str) -> list[Attempt]:
        """Return the DONE rounds without an evaluation."""
        table = schema.rounds
        rows = connection.execute(
            select(table)
            .where(
                table.c.run_id == run_id,
                table.c.phase == Phase.DONE,
                table.c.evaluation.is_(None),
            )
            .order_by(table.c.round)
        ).all()
        return [read_attempt(connection, row) for row in rows]

    @reads
    def good_evaluations(
        self, connection: Connection, run_id: str, *, metrics: Collection[str] = ()
    ) -> dict[int, ModelEvaluation]:
        """Return the evaluations of the models of DONE rounds that aren't bad, by round.

        Loss and accuracy, and of the task's own metrics those that are named.
        """
        table = schema.rounds
        names = sorted(set(metrics) - {"loss", "accuracy"})
        rows = connection.execute(
            select(table.c.round, *(measured(name) for name in ("loss", "accuracy", *names)))
            .where(
                table.c.run_id == run_id,
                table.c.phase == Phase.DONE,
                table.c.evaluation.is_not(None),
                table.c.alarm.is_(None),
            )
            .order_by(table.c.round)
        ).all()
        return {
            number: ModelEvaluation(
                accuracy=accuracy, loss=loss, metrics=dict(zip(names, values, strict=True))
            )
            for number, loss, accuracy, *values in rows
        }

    @reads
    def last_done_round(self, connection: Connection, run_id: str) -> Attempt | None:
        """Return the last DONE round, None if there is none."""
        row = connection.execute(_last_done(run_id)).first()
        return None if row is None else read_attempt(connection, row)

    @reads
    def time_spent_s(self, connection: Connection, run_id: str) -> float:
        """Return the sum of the seconds that the ended attempts of a run took."""
        table = schema.rounds
        spent_s = connection.execute(
            select(func.sum(table.c.finished_s - table.c.opened_s)).where(table.c.run_id == run_id)
        ).scalar()
        return spent_s or 0.0

    @reads
    def regressed_round(self, connection: Connection, run_id: str) -> Attempt | None:
        """Return the last DONE round if its model is bad; else None."""
        row = connection.execute(_last_done(run_id)).first()
        if row is None or row.alarm is None:
            return None
        return read_attempt(connection, row)

    @reads
    def best_model(
        self, connection: Connection, run_id: str, goal: Goal
    ) -> tuple[int, str, float] | None:
        """Return round, digest and value of the run's best model, the earliest of equals.

        None while no model was evaluated.
        """
        table, value = schema.rounds, measured(goal.name)
        row = connection.execute(
            select(table.c.round, table.c.model_digest, value)
            .where(table.c.run_id == run_id, table.c.phase == Phase.DONE, value.is_not(None))
            .order_by(value.desc() if goal.is_highest else value, table.c.round)
            .limit(1)
        ).first()
        return None if row is None else (row[0], row[1], row[2])

    @reads
    def models_let_go(
        self,
        connection: Connection,
        run_id: str,
        digests: Collection[str],
        *,
        since_round: int,
        goal: Goal,
    ) -> set[str]:
        """Return the digests that only rounds of this run before `since_round` name.

        `digests` are of models and server states. Not returned are the run's best model with its
        server state, the base models of orders that go on, and whatever another run names.
        """
        table, orders = schema.rounds, schema.orders
        named = (
            *(table.c.base_digest, table.c.base_state_digest),
            *(table.c.model_digest, table.c.state_digest),
        )
        rows = connection.execute(
            select(
                *(table.c.run_id, table.c.round, table.c.attempt, table.c.phase, *named),
                measured(goal.name).label("value"),
            ).where(or_(*(column.in_(digests) for column in named)))
        ).all()
        going_on = connection.execute(
            select(orders.c.round, orders.c.attempt)
            .distinct()
            .where(
                orders.c.run_id == run_id,
                orders.c.state.in_([OrderState.OPEN, OrderState.STORED]),
            )
        ).all()
        old = [row for row in rows if row.run_id == run_id and row.round < since_round]
        kept = _blobs_of(row for row in rows if row not in old)
        began_with = {(row.round, row.attempt) for row in going_on}
        kept |= {row.base_digest for row in old if (row.round, row.attempt) in began_with}
        done = {
            row.round: row
            for row in rows
            if row.run_id == run_id and row.phase == Phase.DONE and row.value is not None
        }
        best = goal.best_of({number: row.value for number, row in done.items()})
        if best is not None:
            kept |= {done[best].model_digest, done[best].state_digest}
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


def _last_done(run_id: str) -> Select[Any]:
    table = schema.rounds
    return (
        select(table)
        .where(table.c.run_id == run_id, table.c.phase == Phase.DONE)
        .order_by(table.c.round.desc())
        .limit(1)
    )
