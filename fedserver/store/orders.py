"""Orders, and the updates that they end with."""

import time
from collections.abc import Collection
from dataclasses import asdict

from sqlalchemy import Connection, func, insert, select

from fedrounds.types import OrderEnd
from fedserver.events import update_event
from fedserver.phases import OrderEvent, OrderState, Phase
from fedserver.records import (
    Arrival,
    Attempt,
    Event,
    HeldState,
    OrderRecord,
    Participation,
    StoredUpdate,
    json_number,
)
from fedserver.store import schema
from fedserver.store.rows import read_stored, updates_in, updates_of
from fedserver.store.run_clock import read_clock
from fedserver.store.tables import D_co, Tables, reads, writes
from fedserver.store.transitions import (
    add_events,
    find_order,
    find_order_end,
    hold_update,
    move_order,
    suspend_client,
)

_LATE_EVIDENCE = {"kind": "stale"}
"""The evidence of a LATE update. The kind keeps its old name: databases and scripts hold it."""


class Orders(Tables[D_co]):
    """The orders of every run, and the updates that they end with."""

    @reads
    def find_order(self, connection: Connection, order_id: str) -> OrderRecord:
        """Return what is known of an order.

        Raises:
            NotFound: no such order was ever given.
        """
        return find_order(connection, order_id)

    @reads
    def find_order_end(self, connection: Connection, order_id: str) -> OrderEnd | None:
        """Return how an order ended without an update that counts; None while it goes on."""
        return find_order_end(connection, order_id)

    @reads
    def knows_client(self, connection: Connection, run_id: str, client_id: int) -> bool:
        """Return whether a client was ever asked in a run, or has a session in it."""
        orders, sessions = schema.orders, schema.sessions
        asked = connection.execute(
            select(orders.c.order_id)
            .where(orders.c.run_id == run_id, orders.c.client_id == client_id)
            .limit(1)
        ).first()
        served = connection.execute(
            select(sessions.c.client_ids).where(sessions.c.run_id == run_id)
        ).scalars()
        return asked is not None or any(client_id in client_ids for client_ids in served)

    @reads
    def last_counted_orders(
        self, connection: Connection, run_id: str, *, stored_too: bool = False
    ) -> dict[int, str]:
        """Return each client's last COUNTED order; those of a round rolled back are undone.

        With `stored_too` those whose updates are to be counted next count already.
        """
        table, updates, rounds = schema.orders, schema.updates, schema.rounds
        states = [OrderState.COUNTED, *([OrderState.STORED] if stored_too else [])]
        came_into = (rounds.c.round == updates.c.round) & (rounds.c.attempt == updates.c.attempt)
        rows = connection.execute(
            select(table.c.client_id, table.c.order_id)
            .join(updates, updates.c.order_id == table.c.order_id)
            .join(rounds, (rounds.c.run_id == table.c.run_id) & came_into)
            .where(
                table.c.run_id == run_id,
                table.c.state.in_(states),
                (rounds.c.phase == Phase.DONE) | (table.c.state == OrderState.STORED),
            )
            .order_by(
                updates.c.round,
                func.coalesce(updates.c.received_s, 0.0),
                updates.c.received_at,
            )
        ).all()
        return {row.client_id: row.order_id for row in rows}

    @reads
    def participation(self, connection: Connection, run_id: str) -> dict[int, Participation]:
        """Return how often each client was asked and answered, and its last loss, by client id."""
        orders, updates = schema.orders, schema.updates
        of_run = orders.c.run_id == run_id
        has_answered = orders.c.state.in_([OrderState.STORED, OrderState.COUNTED])
        counts = connection.execute(
            select(
                orders.c.client_id,
                func.count().label("num_asked"),
                func.count().filter(has_answered).label("num_answered"),
                func.max(orders.c.round).filter(has_answered).label("last_round"),
            )
            .where(of_run)
            .group_by(orders.c.client_id)
        ).all()
        last = {row.client_id: row.last_round for row in counts}
        metrics = connection.execute(
            select(orders.c.client_id, orders.c.round, updates.c.metrics)
            .join(updates, updates.c.order_id == orders.c.order_id)
            .where(of_run, has_answered, orders.c.round.in_(set(last.values()) - {None}))
            # A round that was rolled back has more than one attempt with answers.
            .order_by(orders.c.round, orders.c.attempt)
        ).all()
        losses = {
            row.client_id: row.metrics.get("global_loss", row.metrics.get("loss"))
            for row in metrics
            if row.round == last[row.client_id]
        }
        return {
            row.client_id: Participation(
                num_asked=row.num_asked,
                num_answered=row.num_answered,
                loss=_number(losses.get(row.client_id)),
            )
            for row in counts
        }

    @writes
    def record_arrival(
        self, connection: Connection, run_id: str, arrival: Arrival, *, buffer_size: int = 0
    ) -> tuple[OrderState, bool]:
        """Record an update that has arrived, and end its order with STORE, REFUSE or MISS.

        Returns the state of the order afterwards, and whether this call recorded the update. Only
        an OPEN order changes its state. The first update of an order that had ended before is
        recorded as late; any further update of an order changes nothing and is no event.

        With a `buffer_size` (an asynchronous run) the update comes into the round that collects.
        If that round has `buffer_size` updates already, or no round collects, nothing changes and
        the order stays OPEN: the caller tries again when the next round has opened.

        A REFUSED update is in quarantine from then on, and its client is suspended. A late update
        is in quarantine if bytes of it have arrived.
        """
        received, order_event, refusal = arrival.update, arrival.order_event, arrival.refusal
        order = find_order(connection, received.order_id)
        state = order.state
        if order.digest is not None:
            return state, False
        at = time.time()
        round_key: tuple[int, int] | None = order.round_number, order.attempt
        if state is OrderState.OPEN:
            if buffer_size:
                round_key = _buffer(connection, run_id, order_event, buffer_size)
            if round_key is None:
                return state, False
            state = move_order(
                connection,
                received.order_id,
                state,
                order_event,
                handed_out_at=arrival.handed_out_at,
                ended_at=None if order_event is OrderEvent.STORE else at,
                order_end=OrderEnd.ROUND_CLOSED if order_event is OrderEvent.MISS else None,
            )
        # State, update, quarantine, suspension and event are one transaction: a kill leaves all
        # or nothing, and nobody can close the round between the check above and the insert below.
        # The payload is durable by now, the receipt comes after: see fedserver.updates.spool.
        metrics = {name: json_number(value) for name, value in received.metrics.items()}
        assert round_key is not None
        values = asdict(received) | {
            "round": round_key[0],
            "attempt": round_key[1],
            "metrics": metrics,
            "measurements": received.measurements or None,
            "delta_norm": arrival.delta_norm,
            "received_at": at,
            "received_s": read_clock(connection, run_id),
            "answered_s": arrival.answered_s,
            "reason": refusal.reason if refusal else None,
        }
        connection.execute(insert(schema.updates), values)
        is_kept = arrival.kept_bytes > 0 and state is not OrderState.STORED
        if state is OrderState.REFUSED or is_kept:
            hold_update(
                connection,
                run_id,
                received.order_id,
                refusal.evidence if refusal else _LATE_EVIDENCE,
                kept_bytes=arrival.kept_bytes,
                at=at,
            )
        event = update_event(
            arrival,
            state,
            order_end=find_order_end(connection, received.order_id),
            client_id=order.client_id,
            round_key=round_key,
            occurred_at=at,
        )
        if state is OrderState.REFUSED:
            assert refusal is not None
            event = suspend_client(
                connection,
                run_id,
                event,
                client_id=order.client_id,
                reason=refusal.reason,
            )
        add_events(connection, run_id, [event])
        return state, True

    @writes
    def abandon_order(
        self,
        connection: Connection,
        run_id: str,
        order_id: str,
        event: Event,
        *,
        strikes: bool = False,
    ) -> bool:
        """End an open order as ABANDONED; returns False if it wasn't open any more.

        With `strikes` its client gets a strike and is suspended.
        """
        order = find_order(connection, order_id)
        if order.state is not OrderState.OPEN:
            return False
        move_order(
            connection,
            order_id,
            order.state,
            OrderEvent.ABANDON,
            ended_at=event.occurred_at,
            order_end=OrderEnd.GIVEN_UP,
        )
        if strikes:
            event = suspend_client(
                connection, run_id, event, client_id=order.client_id, reason=event.kind
            )
        add_events(connection, run_id, [event])
        return True

    @reads
    def stored_updates(self, connection: Connection, collected: Attempt) -> list[StoredUpdate]:
        """Return the STORED and COUNTED updates of a round by client id, as aggregation does."""
        wanted = updates_in(collected.run_id, collected.round_number, collected.attempt).where(
            schema.orders.c.state.in_([OrderState.STORED, OrderState.COUNTED])
        )
        rows = connection.execute(wanted).all()
        return [read_stored(row) for row in rows]

    @reads
    def counted_updates(
        self, connection: Connection, run_id: str, round_numbers: Collection[int]
    ) -> dict[int, list[StoredUpdate]]:
        """Return the COUNTED updates of those of these rounds that are DONE, by round."""
        rounds, updates = schema.rounds.alias("came_into"), schema.updates
        wanted = (
            updates_of(run_id)
            .join(
                rounds,
                (rounds.c.round == updates.c.round) & (rounds.c.attempt == updates.c.attempt),
            )
            .where(
                rounds.c.run_id == run_id,
                rounds.c.phase == Phase.DONE,
                updates.c.round.in_(round_numbers),
                schema.orders.c.state == OrderState.COUNTED,
            )
        )
        by_round: dict[int, list[StoredUpdate]] = {}
        for row in connection.execute(wanted):
            by_round.setdefault(row.round, []).append(read_stored(row))
        return by_round

    @reads
    def updates_to_keep(
        self, connection: Connection, run_id: str, *, since_round: int
    ) -> dict[str, str | None]:
        """Return the orders whose updates the spool must keep, each with its update's digest.

        These are the orders that go on, those COUNTED from round `since_round` on, and those with
        an update HELD: a fenced stream leaves its bytes in the spool until the quarantine is
        tidied. The digest is None for an order that has no update yet.
        """
        orders, updates, held = schema.orders, schema.updates, schema.quarantine
        asked = (
            select(orders.c.order_id, updates.c.digest)
            .outerjoin(updates, updates.c.order_id == orders.c.order_id)
            .where(orders.c.run_id == run_id)
        )
        going_on = connection.execute(
            asked.where(orders.c.state.in_([OrderState.OPEN, OrderState.STORED]))
        ).all()
        counted = connection.execute(
            asked.where(orders.c.state == OrderState.COUNTED, updates.c.round >= since_round)
        ).all()
        kept = connection.execute(
            asked.join(held, held.c.order_id == orders.c.order_id).where(
                held.c.state == HeldState.HELD, held.c.kept_bytes > 0
            )
        ).all()
        return {row.order_id: row.digest for row in (*going_on, *counted, *kept)}


def _number(value: float | str | None) -> float | None:
    """Return a metric as it was before `json_number`."""
    return None if value is None else float(value)


def _buffer(
    connection: Connection, run_id: str, order_event: OrderEvent, buffer_size: int
) -> tuple[int, int] | None:
    """Return the round and attempt that an update comes into; None if it must wait.

    A refused update may also come into a round that is closed: it doesn't count there.
    """
    rounds, orders, updates = schema.rounds, schema.orders, schema.updates
    row = connection.execute(
        select(rounds.c.round, rounds.c.attempt, rounds.c.phase)
        .where(
            rounds.c.run_id == run_id,
            rounds.c.phase.in_([Phase.COLLECTING, Phase.AGGREGATING]),
        )
        .order_by(rounds.c.round.desc())
        .limit(1)
    ).first()
    if row is None:
        return None
    if order_event is OrderEvent.STORE:
        num_stored = connection.execute(
            select(func.count())
            .select_from(updates)
            .join(orders, orders.c.order_id == updates.c.order_id)
            .where(
                updates.c.round == row.round,
                updates.c.attempt == row.attempt,
                orders.c.run_id == run_id,
                orders.c.state == OrderState.STORED,
            )
        ).scalar_one()
        if row.phase != Phase.COLLECTING or num_stored >= buffer_size:
            return None
    return row.round, row.attempt
