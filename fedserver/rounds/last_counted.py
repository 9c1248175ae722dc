"""Which order of each client counted last: every further order of the client names it.

A client that keeps a state of its own (SCAFFOLD's control variate, a personal model) takes up the
state that belongs to that order, so that an update that didn't count leaves no trace in it.
"""

from collections.abc import Iterable, Mapping

from fedserver.store import AsyncStore


class LastCounted:
    """The ids of these orders, by client id. The store is the truth; this saves asking it."""

    def __init__(self, store: AsyncStore, run_id: str, *, counts_stored: bool) -> None:
        """With `counts_stored` an order counts as soon as its update is stored.

        So it is in an asynchronous run: a client gets its next order before the round closes.
        """
        self._store = store
        self._run_id = run_id
        self._counts_stored = counts_stored
        self._order_ids: dict[int, str] = {}

    @property
    def order_ids(self) -> Mapping[int, str]:
        """The id of each client's last order that counts; clients without it are missing."""
        return self._order_ids

    async def read(self) -> None:
        """Read them anew from the store: after a start, or when what counted doesn't any more."""
        self._order_ids = await self._store.orders.last_counted_orders(
            self._run_id, stored_too=self._counts_stored
        )

    def note(self, order_ids: Iterable[tuple[int, str]]) -> None:
        """Note orders that count from now on, each with its client's id, in order."""
        self._order_ids.update(order_ids)
