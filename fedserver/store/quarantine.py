"""Updates kept out of the global model, and suspended clients."""

from sqlalchemy import Select, select, update

from fedrounds.errors import NotFound
from fedserver.phases import OrderState
from fedserver.records import Event, HeldState, HeldUpdate, Suspension
from fedserver.store import schema
from fedserver.store.database import Database
from fedserver.store.rows import read_held, read_suspension
from fedserver.store.transitions import add_events, reinstate_clients


class Quarantine(Database):
    """What is held, why, and who may not take part for now."""

    def held_updates(self, run_id: str | None = None) -> list[HeldUpdate]:
        """Return the updates ever put in quarantine, oldest first; of all runs, or of one."""
        query = _held()
        if run_id is not None:
            query = query.where(schema.quarantine.c.run_id == run_id)
        with self.reading() as connection:
            return [read_held(row) for row in connection.execute(query)]

    def find_held(self, order_id: str) -> HeldUpdate:
        """Return one update in quarantine.

        Raises:
            NotFound: no update of this order was ever put there.
        """
        with self.reading() as connection:
            row = connection.execute(
                _held().where(schema.quarantine.c.order_id == order_id)
            ).first()
        if row is None:
            raise NotFound(
                f"no update of an order {order_id!r} is in quarantine; `quarantine list` shows "
                "those that are"
            )
        return read_held(row)

    def free_held(self, held: HeldUpdate, state: HeldState, happened: Event) -> bool:
        """Take an update out of quarantine; returns whether it was still HELD.

        RELEASED says that it was good: its client is active again and the norm band doesn't
        exclude it from then on.
        """
        table = schema.quarantine
        with self.writing() as connection:
            freed = connection.execute(
                update(table)
                .where(table.c.order_id == held.order_id, table.c.state == HeldState.HELD)
                .values(state=state)
            ).rowcount
            if not freed:
                return False
            if state is HeldState.RELEASED:
                reinstate_clients(connection, held.run_id, [held.client_id])
            add_events(connection, held.run_id, [happened])
            return True

    def suspensions(self, run_id: str) -> dict[int, Suspension]:
        """Return the suspensions of clients, by client id."""
        table = schema.standings
        with self.reading() as connection:
            rows = connection.execute(select(table).where(table.c.run_id == run_id)).all()
        return {row.client_id: read_suspension(row) for row in rows}

    def trusted_clients(self, run_id: str) -> set[int]:
        """Return the clients an update of which was excluded by its norm, and released."""
        orders, table = schema.orders, schema.quarantine
        with self.reading() as connection:
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
