"""The history as JSON: what `history --json` and `show --json` print.

The names and their order are a promise to whoever reads it. Times are ISO 8601 in UTC; numbers that
aren't finite are held by their names.
"""

from typing import Any

from fedrounds.times import iso_time
from fedserver.history import AttemptHistory, CompressionSummary, OrderHistory, UpdateHistory
from fedserver.records import Event


def attempt_json(attempt: AttemptHistory) -> dict[str, Any]:
    """Return the object of an attempt at a round; what isn't known yet is None.

    `carried_over` counts the orders of earlier rounds that were at work when it opened.
    """
    evaluation, client_evaluation = attempt.evaluation, attempt.client_evaluation
    return {
        "round": attempt.round_number,
        "attempt": attempt.attempt,
        "phase": attempt.phase,
        "adjustments": attempt.adjustments.as_json(),
        "cohort": attempt.cohort,
        "updates": [_update_json(update) for update in attempt.updates],
        "compression": _compression_json(attempt.compression),
        "carried_over": attempt.num_carried_over,
        "base_digest": attempt.base_digest,
        "base_bytes": attempt.base_bytes,
        "model_digest": attempt.model_digest,
        "evaluation": None if evaluation is None else evaluation.as_json(),
        "client_evaluation": None if client_evaluation is None else client_evaluation.as_json(),
        "started_at": iso_time(attempt.started_at),
        "closed_at": _iso(attempt.closed_at),
        "finished_at": _iso(attempt.finished_at),
        "collected_s": attempt.collected_s,
        "took_s": attempt.took_s,
        "orders": [_order_json(order) for order in attempt.orders],
        "incidents": [_incident_json(incident) for incident in attempt.incidents],
    }


def _update_json(update: UpdateHistory) -> dict[str, Any]:
    return {
        "order_id": update.order_id,
        "client": update.client_id,
        "staleness": update.staleness,
        "num_examples": update.num_examples,
        "digest": update.digest,
        "encoding": update.encoding,
        "size_bytes": update.size_bytes,
        "verdict": update.verdict,
        "metrics": update.metrics,
        "reason": update.reason,
        "received_at": iso_time(update.received_at),
        "received_after_s": update.received_after_s,
        "answered_s": update.answered_s,
    }


def _order_json(order: OrderHistory) -> dict[str, Any]:
    return {
        "order_id": order.order_id,
        "client": order.client_id,
        "state": order.state,
        "handed_out_at": _iso(order.handed_out_at),
        "ended_at": _iso(order.ended_at),
    }


def _incident_json(incident: Event) -> dict[str, Any]:
    return {
        "kind": incident.kind,
        "at": iso_time(incident.occurred_at),
        "client": incident.client_id,
        **incident.fields,
    }


def _compression_json(compression: CompressionSummary | None) -> dict[str, float] | None:
    if compression is None:
        return None
    error = {} if compression.error is None else {"error": compression.error}
    return {"ratio": compression.ratio} | error


def _iso(at: float | None) -> str | None:
    return None if at is None else iso_time(at)
