"""Reads a run's history: every attempt at a round with its orders, updates and incidents."""

from typing import Any

from sqlalchemy import Connection, Row, select

from fedserver.history import AttemptHistory, AttemptResult, OrderHistory, UpdateHistory
from fedserver.phases import OrderState, Phase
from fedserver.records import ClientEvaluation, Event, ModelEvaluation, Run
from fedserver.store import schema
from fedserver.store.rows import (
    measured,
    read_adjustments,
    read_client_evaluation,
    read_evaluation,
    updates_in,
)
from fedserver.store.store import Store


def read_history(
    store: Store, run: Run, *, first_round: int = 1, last_round: int | None = None
) -> list[AttemptHistory]:
    """Return every attempt at a round, in order: of all rounds, or of those from first to last."""
    table = schema.rounds
    wanted = select(table).where(table.c.run_id == run.run_id, table.c.round >= first_round)
    if last_round is not None:
        wanted = wanted.where(table.c.round <= last_round)
    with store.database.reading() as connection:
        rows = connection.execute(wanted.order_by(table.c.round, table.c.attempt)).all()
        return [_read_attempt(connection, row) for row in rows]


def read_rounds(store: Store, run: Run, *, metric: str = "loss") -> list[AttemptResult]:
    """Return the result of every attempt at a round, in order, without clients and incidents.

    An evaluation holds accuracy, loss and the task's `metric` alone. It is one query, in a run of
    any length and with any number of clients.
    """
    table = schema.rounds
    wanted = select(
        table.c.round,
        table.c.attempt,
        table.c.phase,
        table.c.base_digest,
        table.c.model_digest,
        table.c.client_evaluation,
        measured("accuracy"),
        measured("loss"),
        measured(metric).label("metric"),
        table.c.evaluation.is_not(None).label("is_evaluated"),
        table.c.evaluation["confusion"].as_string().is_not(None).label("has_confusion"),
    ).where(table.c.run_id == run.run_id)
    with store.database.reading() as connection:
        rows = connection.execute(wanted.order_by(table.c.round, table.c.attempt)).all()
        return [
            AttemptResult(
                round_number=row.round,
                attempt=row.attempt,
                phase=Phase(row.phase),
                base_digest=row.base_digest,
                model_digest=row.model_digest,
                evaluation=(
                    ModelEvaluation(
                        accuracy=row.accuracy,
                        loss=row.loss,
                        metrics={} if metric in ("accuracy", "loss") else {metric: row.metric},
                    )
                    if row.is_evaluated
                    else None
                ),
                client_evaluation=_client_evaluation(row),
                has_confusion=bool(row.has_confusion),
            )
            for row in rows
        ]


def _read_attempt(connection: Connection, row: Row[Any]) -> AttemptHistory:
    evaluation = None if row.evaluation is None else read_evaluation(row.evaluation)
    return AttemptHistory(
        round_number=row.round,
        attempt=row.attempt,
        phase=Phase(row.phase),
        adjustments=read_adjustments(row.adjustments),
        orders=_read_orders(connection, row),
        updates=_read_updates(connection, row),
        incidents=_read_incidents(connection, row),
        num_carried_over=row.num_carried_over,
        base_digest=row.base_digest,
        base_bytes=row.base_bytes,
        model_digest=row.model_digest,
        evaluation=evaluation,
        client_evaluation=_client_evaluation(row),
        has_confusion=evaluation is not None and evaluation.confusion is not None,
        started_at=row.started_at,
        closed_at=row.closed_at,
        finished_at=row.finished_at,
        collected_s=_after_s(row, row.closed_s, row.closed_at),
        took_s=_after_s(row, row.finished_s, row.finished_at),
    )


def _client_evaluation(row: Row[Any]) -> ClientEvaluation | None:
    values = row.client_evaluation
    return None if values is None else read_client_evaluation(values)


def _read_orders(connection: Connection, attempt: Row[Any]) -> list[OrderHistory]:
    orders = schema.orders
    rows = connection.execute(
        select(orders)
        .where(
            orders.c.run_id == attempt.run_id,
            orders.c.round == attempt.round,
            orders.c.attempt == attempt.attempt,
        )
        .order_by(orders.c.client_id, orders.c.order_id)
    ).all()
    return [
        OrderHistory(
            order_id=row.order_id,
            client_id=row.client_id,
            state=OrderState(row.state),
            handed_out_at=row.handed_out_at,
            ended_at=row.ended_at,
        )
        for row in rows
    ]


def _read_updates(connection: Connection, attempt: Row[Any]) -> list[UpdateHistory]:
    rows = connection.execute(updates_in(attempt.run_id, attempt.round, attempt.attempt)).all()
    return [
        UpdateHistory(
            order_id=row.order_id,
            client_id=row.client_id,
            staleness=row.round - row.given_in,
            num_examples=row.num_examples,
            digest=row.digest,
            encoding=row.encoding,
            size_bytes=row.size_bytes,
            verdict=OrderState(row.state),
            metrics=row.metrics,
            reason=row.reason,
            received_at=row.received_at,
            received_after_s=_after_s(attempt, row.received_s, row.received_at),
            answered_s=_answered_s(row),
        )
        for row in rows
    ]


def _read_incidents(connection: Connection, attempt: Row[Any]) -> list[Event]:
    """Return the incidents of an attempt; of the first attempt also those from before it opened."""
    events = schema.events
    belongs_here = (events.c.round == attempt.round) & (events.c.attempt == attempt.attempt)
    if (attempt.round, attempt.attempt) == (1, 1):
        belongs_here |= events.c.round.is_(None)
    rows = connection.execute(
        select(events)
        .where(events.c.run_id == attempt.run_id, belongs_here, events.c.is_incident)
        .order_by(events.c.sequence)
    ).all()
    return [
        Event(
            kind=row.kind,
            occurred_at=row.at,
            round_number=row.round,
            attempt=row.attempt,
            client_id=row.client_id,
            is_incident=True,
            fields=row.fields,
        )
        for row in rows
    ]


def _answered_s(update: Row[Any]) -> float | None:
    """Return the seconds an update took since its order was handed out, if that is on record."""
    if update.answered_s is not None or update.handed_out_at is None:
        return update.answered_s  # type: ignore[no-any-return]
    return max(0.0, float(update.received_at - update.handed_out_at))


def _after_s(opened: Row[Any], reading_s: float | None, at: float | None) -> float | None:
    """Return the seconds from an attempt's opening to a moment; None before it or if unknown.

    By the run's clock; by the wall clock in rows that have no readings of it.
    """
    if reading_s is not None and opened.opened_s is not None:
        return float(reading_s - opened.opened_s)
    if at is None or at < opened.started_at:
        return None
    return float(at - opened.started_at)
