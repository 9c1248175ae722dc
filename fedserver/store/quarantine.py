"""Updates kept out of the global model, and suspended clients."""

from sqlalchemy import Connection, Select, select, update

from fedrounds.errors import NotFound
from fedserver.phases import OrderState
from fedserver.records import Event, HeldState, HeldUpdate, Suspension
from fedserver.store import schema
from fedserver.store.rows import read_held, read_suspension
from fedserver.store.tables import D_co, Tables, reads, writes
from fedserver.store.transitions import add_events, reinstate_clients


class Quarantine(Tables[D_co]):
    """Updates kept out of the global model with the reason, and suspended clients."""

    @reads
    def held_updates(self, connection: Connection, run_id: str | None = None) -> list[HeldUpdate]:
        """Return all updates ever put in quarantine, oldest first; of `run_id` alone if given."""
        query = _held()
        if run_id is not None:
            query = query.where(schema.quarantine.c.run_id == run_id)
        return [read_held(row) for row in connection.execute(query)]

    @reads
    def find_held(self, connection: Connection, order_id: str) -> HeldUpdate:
        """Return the update of an order that is or was in quarantine.

        Raises:
            NotFound: no update of this order was ever put there.
        """
        row = connection.execute(_held().where(schema.quarantine.c.order_id == order_id)).first()
        if row is None:
            raise NotFound(
                f"no update of an order {order_id!r} is in quarantine; `quarantine list` shows "
                "those that are"
            )
        return read_held(row)

    @writes
    def free_held(
        self, connection: Connection, held: HeldUpdate, state: HeldState, event: Event
    ) -> bool:
        """Take an update out of quarantine; returns False if it wasn't HELD any more.

        RELEASED means that it was good: its client is active again, and the norm band doesn't
        exclude that client's updates from then on.
        """
        table = schema.quarantine
        freed = connection.execute(
            update(table)
            .where(table.c.order_id == held.order_id, table.c.state == HeldState.HELD)
            .values(state=state)
        ).rowcount
        if not freed:
            return False
        if state is HeldState.RELEASED:
            reinstate_clients(connection, held.run_id, [held.client_id])
        add_events(connection, held.run_id, [event])
        return True

    @reads
    def suspensions(self, connection: Connection, run_id: str) -> dict[int, Suspension]:
        """Return the suspensions of clients, by client id."""
        table = schema.standings
        rows = connection.execute(select(table).where(table.c.run_id == run_id)).all()
        return {row.client_id: read_suspension(row) for row in rows}

    @reads
    def trusted_clients(self, connection: Connection, run_id: str) -> set[int]:
        """Return the clients with an update that was excluded by its norm and then released."""
        orders, table = schema.orders, schema.quarantine
        return set(
            connection.execute(
                select(orders.c.client_id)
                .join(table, table.c.order_id == orders.c.order_id)
                .where(
                    table.c.run_id == run_id,
                    table.c.state == HeldState.RELEASED,
                    orders.c.state == OrderState.EXCLUDED,
                )
            ).scalars()
        )


def _held() -> Select[tuple[object, ...]]:
    orders, updates, table = schema.orders, schema.updates, schema.quarantine
    return (
        select(
            table,
            orders.c.client_id,
            orders.c.round,
            orders.c.state.label("verdict"),
            updates.c.digest,
            updates.c.reason,
        )
        .join(orders, orders.c.order_id == table.c.order_id)
        .join(updates, updates.c.order_id == table.c.order_id)
        .order_by(table.c.held_at)
    )
