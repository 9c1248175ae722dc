"""Asynchronous collecting (FedBuff): a round closes when its buffer is full of updates.

No client waits for others: a client that has sent an update gets a further order at once. Orders
that are open when the buffer is full are carried over, and their updates come into the next round.
"""

from collections.abc import Sequence
from dataclasses import replace

from fedrounds.types import WorkOrder
from fedserver.clients.open_orders import OpenOrders, OpenRound
from fedserver.clients.sessions import Sessions
from fedserver.housekeeping.disk import DiskWatch
from fedserver.models.checkpoints import Checkpoints
from fedserver.phases import OrderState, RoundEvent, due_of_buffer
from fedserver.records import Attempt, Exclusion, StoredUpdate
from fedserver.rounds.collecting import Due, too_few_updates
from fedserver.rounds.last_counted import LastCounted
from fedserver.rounds.opening import clients_now, read_participation
from fedserver.rounds.planning import admission_limits, idle_clients, plan_more, work_orders
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.store import AsyncStore


class AsynchronousCollecting:
    """A round gives orders until its buffer is full; see `Collecting`."""

    carries_over = True

    def __init__(
        self,
        context: RunContext,
        *,
        last_counted: LastCounted,
        sessions: Sessions,
        open_orders: OpenOrders,
        store: AsyncStore,
        checkpoints: Checkpoints,
        disk: DiskWatch,
        threads: Threads,
    ) -> None:
        self._context = context
        self._last_counted = last_counted
        self._sessions = sessions
        self._open_orders = open_orders
        self._store = store
        self._checkpoints = checkpoints
        self._disk = disk
        self._threads = threads
        self._buffer_size = context.strategy.buffer_size
        self.max_at_work = context.settings.concurrency

    async def due(self, current: Attempt) -> Due | None:
        """See `Collecting`; the rule is `due_of_buffer`. Gives further orders while it can."""
        # Once the buffer is full, orders are better given with the model that comes out of it.
        event = self._due_event(can_go_on=True)
        if event is None:
            event = self._due_event(can_go_on=await self.give_more())
        if event is None:
            return None
        if event is RoundEvent.CLOSE:
            return Due(event=event)
        num_stored = self._open_orders.states().count(OrderState.STORED)
        return await too_few_updates(
            f"{num_stored} of {self._buffer_size} updates are there, nobody is at work, and "
            "whoever is here has given up or sits out",
            self._open_orders.list_all(),
            # The round asks further clients as long as it can: any refusal is a reason.
            is_by_refusals=True,
            store=self._store,
        )

    def _due_event(self, *, can_go_on: bool) -> RoundEvent | None:
        states = self._open_orders.states()
        return due_of_buffer(states, buffer_size=self._buffer_size, can_go_on=can_go_on)

    async def give_more(self) -> bool:
        """Give further orders in the round that collects, up to --concurrency.

        Returns whether its buffer can still be filled: a client is at work, or may come.
        """
        open_orders, settings = self._open_orders, self._context.settings
        assert open_orders.current is not None
        # Again and again: a client may have become idle while the store was awaited.
        while not self.max_at_work or len(open_orders.list_open()) < self.max_at_work:
            here = self._sessions.ready_clients(only_live=True)
            if self._disk.is_low() or not idle_clients(here, open_orders.list_all()):
                break
            record, base = open_orders.current.record, open_orders.current.base
            suspensions = await self._store.quarantine.suspensions(record.run_id)
            past = await read_participation(settings, store=self._store, run_id=record.run_id)
            if self._disk.is_low():
                break
            # Clients register, leave and answer while the store is awaited: who is here and at
            # work is looked at now, and nothing is awaited before the plan is made of it.
            clients = clients_now(self._sessions, open_orders, suspensions=suspensions, past=past)
            more = plan_more(self._context, record, clients)
            if not more:
                break
            # Recorded before they are handed out: a client never has an order that a server which
            # starts again doesn't know.
            await self._store.rounds.add_orders(record, more)
            self._note_stored()
            open_orders.add_orders(
                replace(record, orders=(*record.orders, *more)),
                work_orders(
                    settings,
                    replace(record, orders=more),
                    base,
                    self._last_counted.order_ids,
                    algorithm=self._context.strategy.client_algorithm,
                ),
            )
        is_anybody_here = bool(self._sessions.ready_clients(only_live=True))
        return bool(open_orders.list_open()) or not is_anybody_here or self._disk.is_low()

    def updates_to_count(self, closed: Attempt) -> int:
        """See `Collecting`: a single update left in a buffer is enough for a round."""
        return 1

    async def carried_over(self, opened: Attempt) -> list[tuple[OpenRound, Sequence[WorkOrder]]]:
        """See `Collecting`.

        Raises:
            StorageDamaged: a model that orders of earlier rounds began with isn't what was written.
            NotFound: it is gone.
        """
        settings, strategy = self._context.settings, self._context.strategy
        in_memory = {
            (order.given_in.record.round_number, order.given_in.record.attempt): order.given_in
            for order in self._open_orders.list_all()
        }
        carried_over: list[tuple[OpenRound, Sequence[WorkOrder]]] = []
        for record in await self._store.rounds.carried_over(opened):
            given_in = in_memory.get((record.round_number, record.attempt))
            if given_in is None:
                base = await self._threads.on_disk(self._checkpoints.load, record.base_digest)
                given_in = OpenRound(
                    record=record,
                    base=base,
                    limits=admission_limits(settings, record, strategy=strategy),
                    # The time isn't used: only the round that collects has a deadline.
                    opened_at=0.0,
                )
            given_in = replace(given_in, record=record)
            orders = work_orders(
                settings,
                record,
                given_in.base,
                self._last_counted.order_ids,
                algorithm=strategy.client_algorithm,
            )
            carried_over.append((given_in, orders))
        return carried_over

    def note_closed(self) -> None:
        """See `Collecting`: what is in the buffer counts for its clients' next orders."""
        self._note_stored()

    async def note_finished(
        self, counted: Sequence[StoredUpdate], exclusions: Sequence[Exclusion]
    ) -> None:
        """See `Collecting`: excluded updates were taken to count when they were stored."""
        if exclusions:
            await self._last_counted.read()

    async def note_failed(self) -> None:
        """See `Collecting`: what was stored in the attempt counts for nothing."""
        await self._last_counted.read()

    def _note_stored(self) -> None:
        self._last_counted.note(
            (order.order.client_id, order.order.order_id)
            for order in self._open_orders.list_all()
            if order.state is OrderState.STORED
        )
