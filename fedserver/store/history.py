"""What happened in a run, as plain values for people and programs."""

from typing import Any

from sqlalchemy import Connection, Row, select

from fedrounds.times import iso_time
from fedrounds.types import Encoding
from fedserver.phases import OrderState
from fedserver.records import Run
from fedserver.store import schema
from fedserver.store.rows import measured, updates_in
from fedserver.store.store import Store


def read_history(
    store: Store, run: Run, *, first_round: int = 1, last_round: int | None = None
) -> list[dict[str, Any]]:
    """Return one object for every attempt at a round, in order; of all rounds or those named.

    Keys: round, attempt, phase, adjustments (what of the settings was changed for it), cohort
    (client ids), updates (what came into it: each order_id, client, staleness, num_examples,
    digest, encoding, size_bytes, verdict, metrics, reason, received_at, received_after_s since the
    attempt opened, answered_s since the order was handed out), carried_over (how many
    orders of earlier rounds were at work when it opened), compression (None, or over the updates
    that count: ratio, of the bytes sent to those of whole ones, and error, the mean of what the
    clients say was lost), base_digest, base_bytes, model_digest (None until DONE), evaluation (of
    the round's model: accuracy, loss, the task's metrics, class_accuracy, confusion; None until
    known), client_evaluation (of its base by its clients, if asked; see
    fedserver.models.client_metrics), started_at, closed_at, finished_at (ISO 8601, UTC, or None),
    collected_s from opening to close,
    took_s from opening to end (seconds of the run's clock, not differences of those times; None
    while it isn't known), orders (each order_id, client,
    state, handed_out_at, ended_at), incidents (each kind, at, client, what belongs to the kind; the
    first attempt also has those from before it opened).
    """
    table = schema.rounds
    wanted = select(table).where(table.c.run_id == run.run_id, table.c.round >= first_round)
    if last_round is not None:
        wanted = wanted.where(table.c.round <= last_round)
    with store.reading() as connection:
        rows = connection.execute(wanted.order_by(table.c.round, table.c.attempt)).all()
        return [_round_object(connection, row) for row in rows]


def read_rounds(store: Store, run: Run) -> list[dict[str, Any]]:
    """Return the results of every attempt at a round, in order, without clients and incidents.

    Keys as of `read_history`: round, attempt, phase, base_digest, model_digest, evaluation (only
    accuracy and loss), client_evaluation. Beside them has_confusion: whether the evaluation holds a
    confusion matrix. It is one query, in a run of any length and with any number of clients.
    """
    table = schema.rounds
    wanted = select(
        *(table.c.round, table.c.attempt, table.c.phase, table.c.base_digest),
        *(table.c.model_digest, table.c.client_evaluation, measured("accuracy"), measured("loss")),
        table.c.evaluation.is_not(None).label("is_evaluated"),
        table.c.evaluation["confusion"].as_string().is_not(None).label("has_confusion"),
    ).where(table.c.run_id == run.run_id)
    with store.reading() as connection:
        rows = connection.execute(wanted.order_by(table.c.round, table.c.attempt)).all()
    return [
        {
            "round": row.round,
            "attempt": row.attempt,
            "phase": row.phase,
            "base_digest": row.base_digest,
            "model_digest": row.model_digest,
            "evaluation": {"accuracy": row.accuracy, "loss": row.loss}
            if row.is_evaluated
            else None,
            "client_evaluation": row.client_evaluation,
            "has_confusion": bool(row.has_confusion),
        }
        for row in rows
    ]


def _round_object(connection: Connection, row: Row[Any]) -> dict[str, Any]:
    orders, events = schema.orders, schema.events
    order_rows = connection.execute(
        select(orders)
        .where(
            orders.c.run_id == row.run_id,
            orders.c.round == row.round,
            orders.c.attempt == row.attempt,
        )
        .order_by(orders.c.client_id, orders.c.order_id)
    ).all()
    update_rows = connection.execute(updates_in(row.run_id, row.round, row.attempt)).all()
    belongs_here = (events.c.round == row.round) & (events.c.attempt == row.attempt)
    if (row.round, row.attempt) == (1, 1):
        belongs_here |= events.c.round.is_(None)
    incident_rows = connection.execute(
        select(events)
        .where(events.c.run_id == row.run_id, belongs_here, events.c.is_incident)
        .order_by(events.c.sequence)
    ).all()
    received = [
        {
            "order_id": update.order_id,
            "client": update.client_id,
            "staleness": update.round - update.given_in,
            "num_examples": update.num_examples,
            "digest": update.digest,
            "encoding": update.encoding,
            "size_bytes": update.size_bytes,
            "verdict": update.state,
            "metrics": update.metrics,
            "reason": update.reason,
            "received_at": _iso(update.received_at),
            "received_after_s": _after_s(row, update.received_s, update.received_at),
            "answered_s": _answered_s(update),
        }
        for update in update_rows
    ]
    return {
        "round": row.round,
        "attempt": row.attempt,
        "phase": row.phase,
        "adjustments": row.adjustments,
        "cohort": [order.client_id for order in order_rows],
        "updates": received,
        "compression": _compression(received, base_bytes=row.base_bytes),
        "carried_over": row.num_carried_over,
        "base_digest": row.base_digest,
        "base_bytes": row.base_bytes,
        "model_digest": row.model_digest,
        "evaluation": row.evaluation,
        "client_evaluation": row.client_evaluation,
        "started_at": _iso(row.started_at),
        "closed_at": _iso(row.closed_at),
        "finished_at": _iso(row.finished_at),
        "collected_s": _after_s(row, row.closed_s, row.closed_at),
        "took_s": _after_s(row, row.finished_s, row.finished_at),
        "orders": [
            {
                "order_id": order.order_id,
                "client": order.client_id,
                "state": order.state,
                "handed_out_at": _iso(order.handed_out_at),
                "ended_at": _iso(order.ended_at),
            }
            for order in order_rows
        ],
        "incidents": [
            {"kind": one.kind, "at": _iso(one.at), "client": one.client_id, **one.fields}
            for one in incident_rows
        ],
    }


def _compression(received: list[dict[str, Any]], *, base_bytes: int) -> dict[str, float] | None:
    good = [one for one in received if one["verdict"] in (OrderState.STORED, OrderState.COUNTED)]
    packed = [one for one in good if one["encoding"] != Encoding.STATE_DICT]
    if not packed:
        return None
    errors = [one["metrics"].get("compression_error") for one in packed]
    told = [one for one in errors if isinstance(one, float)]
    ratio = sum(one["size_bytes"] for one in good) / (len(good) * base_bytes)
    return {"ratio": ratio} | ({"error": sum(told) / len(told)} if told else {})


def _iso(at: float | None) -> str | None:
    return None if at is None else iso_time(at)


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
