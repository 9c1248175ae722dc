"""Rows of the tables as the values that the coordinator works with."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, Label, Row, Select, Table, select

from fedrounds.types import ClientUpdate, Encoding, Section
from fedserver.phases import OrderState, Phase
from fedserver.records import (
    Adjustments,
    Attempt,
    ClientEvaluation,
    HeldState,
    HeldUpdate,
    ModelEvaluation,
    Order,
    Refusal,
    Run,
    RunState,
    StoredUpdate,
    Suspension,
)
from fedserver.store import schema


def same_attempt(orders: Table, rounds: Table) -> ColumnElement[bool]:
    """Return the condition that joins orders with the attempts they were given in."""
    return (
        (rounds.c.run_id == orders.c.run_id)
        & (rounds.c.round == orders.c.round)
        & (rounds.c.attempt == orders.c.attempt)
    )


def measured(name: str) -> Label[float | None]:
    """Return one number of a round's evaluation as a column; with its confusion it is large."""
    number: Label[float | None] = schema.rounds.c.evaluation[name].as_float().label(name)
    return number


def updates_of(run_id: str) -> Select[Any]:
    """Return the query for all updates of a run's clients, in the order of aggregation.

    Beside the columns of `updates`: client_id, state, handed_out_at, and of its order
    `num_registered` (how many examples the client had registered when it got the order),
    `given_in` (the round it was given in) and `base_digest` (the base model of that round).
    """
    orders, updates, rounds = schema.orders, schema.updates, schema.rounds
    return (
        select(
            *(orders.c.client_id, orders.c.state, orders.c.round.label("given_in")),
            *(orders.c.handed_out_at, orders.c.num_examples.label("num_registered")),
            *(rounds.c.base_digest, updates),
        )
        .join(updates, updates.c.order_id == orders.c.order_id)
        .join(rounds, same_attempt(orders, rounds))
        .where(orders.c.run_id == run_id)
        .order_by(orders.c.client_id, orders.c.order_id)
    )


def updates_in(run_id: str, round_number: int, attempt: int) -> Select[Any]:
    """Return the query for the updates that came into an attempt; its columns: `updates_of`."""
    updates = schema.updates
    return updates_of(run_id).where(updates.c.round == round_number, updates.c.attempt == attempt)


def read_attempt(connection: Connection, row: Row[Any]) -> Attempt:
    """Return the attempt that a row of `rounds` holds, with its orders by client and sequence."""
    orders = schema.orders
    rows = connection.execute(
        select(orders.c.order_id, orders.c.client_id, orders.c.num_examples, orders.c.state).where(
            orders.c.run_id == row.run_id,
            orders.c.round == row.round,
            orders.c.attempt == row.attempt,
        )
    ).all()
    # As text the tenth of a client's orders would come before its second.
    read = [
        Order(
            order_id=order.order_id,
            client_id=order.client_id,
            num_examples=order.num_examples,
            state=OrderState(order.state),
        )
        for order in rows
    ]
    return Attempt(
        run_id=row.run_id,
        round_number=row.round,
        attempt=row.attempt,
        phase=Phase(row.phase),
        base_digest=row.base_digest,
        base_bytes=row.base_bytes,
        max_delta_norm=row.max_delta_norm,
        base_state_digest=row.base_state_digest,
        model_digest=row.model_digest,
        state_digest=row.state_digest,
        adjustments=read_adjustments(row.adjustments),
        adjustments_after=read_adjustments(row.adjustments_after or {}),
        orders=tuple(sorted(read, key=lambda order: (order.client_id, order.sequence))),
    )


def read_adjustments(values: Mapping[str, Any]) -> Adjustments:
    """Return the adjustments that a column of `rounds` holds."""
    try:
        return Adjustments(**values)
    except TypeError as error:
        raise ValueError(f"adjustments {values!r}: {error}") from error


def read_evaluation(values: Mapping[str, Any]) -> ModelEvaluation:
    """Return the evaluation that a column of `rounds` holds; see `ModelEvaluation.as_json`."""
    known = ("accuracy", "loss", "class_accuracy", "confusion")
    metrics = {name: value for name, value in values.items() if name not in known}
    return ModelEvaluation(**{name: values.get(name) for name in known}, metrics=metrics)


def read_client_evaluation(values: Mapping[str, Any]) -> ClientEvaluation:
    """Return the clients' evaluation that a column of `rounds` holds."""
    try:
        means = tuple(values.get("means_over_clients", ()))
        return ClientEvaluation(**{**values, "means_over_clients": means})
    except TypeError as error:
        raise ValueError(f"clients' evaluation {values!r}: {error}") from error


def read_run(row: Row[Any]) -> Run:
    """Return the run that a row of `runs` holds."""
    return Run(
        run_id=row.run_id, number=row.number, settings=row.settings, state=RunState(row.state)
    )


def read_update(row: Row[Any]) -> ClientUpdate:
    """Return the update that a row of `updates` holds."""
    return ClientUpdate(
        order_id=row.order_id,
        digest=row.digest,
        size_bytes=row.size_bytes,
        sections=tuple(Section(**section) for section in row.sections),
        num_examples=row.num_examples,
        num_steps=row.num_steps,
        metrics=row.metrics,
        measurements=row.measurements or {},
        encoding=Encoding(row.encoding),
    )


def read_stored(row: Row[Any]) -> StoredUpdate:
    """Return the update that a row of `updates_in` holds."""
    return StoredUpdate(
        client_id=row.client_id,
        update=read_update(row),
        delta_norm=row.delta_norm,
        num_registered=row.num_registered,
        own_base=None if row.given_in == row.round else row.base_digest,
        staleness=row.round - row.given_in,
    )


def read_suspension(row: Row[Any]) -> Suspension:
    """Return the suspension that a row of `standings` holds."""
    return Suspension(
        client_id=row.client_id,
        strikes=row.strikes,
        suspended_until=row.suspended_until,
        reason=row.reason,
    )


def read_held(row: Row[Any]) -> HeldUpdate:
    """Return the update that a row of `quarantine` joined with updates and orders holds."""
    return HeldUpdate(
        order_id=row.order_id,
        digest=row.digest,
        run_id=row.run_id,
        client_id=row.client_id,
        round_number=row.round,
        verdict=OrderState(row.verdict),
        state=HeldState(row.state),
        refusal=Refusal(reason=row.reason or "", evidence=row.evidence),
        kept_bytes=row.kept_bytes,
        held_at=row.held_at,
    )
