"""An attempt at a round opens: there are enough clients, it is recorded, then published."""

import logging
from collections.abc import Mapping

from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.tasks.task import Task
from fedserver.clients.open_orders import OpenOrders
from fedserver.clients.sessions import Sessions
from fedserver.events import event_of
from fedserver.housekeeping.disk import DiskWatch
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.models.downloads import Downloads
from fedserver.models.first_model import first_model
from fedserver.numbers import numbers_text
from fedserver.phases import Phase
from fedserver.quorum import clients_to_open
from fedserver.records import Adjustments, Attempt, Event, Participation, Suspension
from fedserver.rounds.collecting import Collecting
from fedserver.rounds.last_counted import LastCounted
from fedserver.rounds.planning import (
    Clients,
    admission_limits,
    plan_round,
    rests_on_past,
    stale_before,
    work_orders,
)
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.settings import ServerSettings
from fedserver.store import AsyncStore

logger = logging.getLogger(__name__)


class Opener:
    """Opens attempts and publishes their orders."""

    def __init__(
        self,
        context: RunContext,
        task: Task,
        *,
        collecting: Collecting,
        last_counted: LastCounted,
        tick_s: float,
        sessions: Sessions,
        open_orders: OpenOrders,
        store: AsyncStore,
        checkpoints: Checkpoints,
        downloads: Downloads,
        disk: DiskWatch,
        threads: Threads,
    ) -> None:
        self._context = context
        self._task = task
        self._collecting = collecting
        self._last_counted = last_counted
        self._tick_s = tick_s
        self._sessions = sessions
        self._open_orders = open_orders
        self._store = store
        self._checkpoints = checkpoints
        self._downloads = downloads
        self._disk = disk
        self._threads = threads

    async def open_next(
        self, ended: Attempt, base: GlobalModel, *, attempt: int
    ) -> tuple[Attempt, GlobalModel]:
        """Open the attempt that follows an attempt that has ended; return it with its base."""
        adjustments = ended.adjustments_after
        if adjustments.num_redraws > ended.adjustments.num_redraws:
            base = await first_model(
                self._task,
                self._context.settings,
                num_redraws=adjustments.num_redraws,
                checkpoints=self._checkpoints,
                threads=self._threads,
            )
        round_number = ended.round_number + (ended.phase is Phase.DONE)
        return await self.open(round_number, base, adjustments, attempt=attempt), base

    async def open(
        self, round_number: int, base: GlobalModel, adjustments: Adjustments, *, attempt: int = 1
    ) -> Attempt:
        """Wait until there are clients enough, then open the round."""
        logged: set[int] | None = None
        while True:
            await self._disk.note_room()
            planned = await self.plan(
                round_number,
                attempt=attempt,
                base=base,
                adjustments=adjustments,
                suspensions=await self._store.quarantine.suspensions(self._context.run_id),
            )
            if planned is not None:
                break
            here = self._sessions.ready_clients(only_live=True)
            needed = clients_to_open(self._context.settings)
            self._open_orders.clients_here = len(here) if len(here) < needed else None
            if here != logged and not self._disk.is_low():
                left = logged - here if logged else set()
                gone = f"; gone: client {numbers_text(left)}" if left else ""
                logger.info("waiting for clients: %d of %d are here%s", len(here), needed, gone)
                logged = here
            await self._sessions.changed.wait(self._tick_s)
        self._open_orders.clients_here = None
        # Recorded before it is published: a client never has an order that a server which starts
        # again doesn't know.
        await self._store.rounds.open_round(
            planned,
            opened_event(planned),
            stale_before=stale_before(self._context.settings, round_number),
        )
        failpoint(FailPoint.ROUND_OPENED)
        await self.publish(planned, base)
        return planned

    async def plan(
        self,
        round_number: int,
        *,
        attempt: int,
        base: GlobalModel,
        adjustments: Adjustments,
        suspensions: Mapping[int, Suspension],
    ) -> Attempt | None:
        """Return the round to open, or None while there are too few clients or too little disk."""
        settings = self._context.settings
        past = await read_participation(settings, store=self._store, run_id=self._context.run_id)
        if self._disk.is_low():
            return None
        # Clients register and leave while the store is awaited: who is here is looked at last.
        clients = clients_now(
            self._sessions,
            self._open_orders,
            suspensions=suspensions,
            past=past,
            only_live=not settings.require_all,
        )
        return plan_round(
            self._context,
            round_number,
            attempt=attempt,
            base=base,
            adjustments=adjustments,
            clients=clients,
            max_at_work=self._collecting.max_at_work,
        )

    async def publish(self, opened: Attempt, base: GlobalModel) -> None:
        """Publish a recorded round: clients that ask get its model and orders from now on.

        Raises:
            StorageDamaged: a model that orders of earlier rounds began with isn't what was written.
            NotFound: it is gone.
        """
        settings, strategy = self._context.settings, self._context.strategy
        carried_over = await self._collecting.carried_over(opened)
        # Before parked clients are woken: they ask for the model at once.
        self._downloads.publish(base.digest, state_digest=base.state_digest)
        self._open_orders.start_round(
            opened,
            base=base,
            limits=admission_limits(settings, opened, strategy=strategy),
            orders=work_orders(
                settings,
                opened,
                base,
                self._last_counted.order_ids,
                algorithm=strategy.client_algorithm,
            ),
            carried_over=carried_over,
        )


def clients_now(
    sessions: Sessions,
    open_orders: OpenOrders,
    *,
    suspensions: Mapping[int, Suspension],
    past: Mapping[int, Participation],
    only_live: bool = True,
) -> Clients:
    """Return the clients that may be asked at this moment."""
    return Clients(
        ready=sessions.ready_clients(only_live=only_live),
        num_examples=sessions.data_sizes(),
        orders=open_orders.list_all(),
        suspensions=suspensions,
        past=past,
    )


async def read_participation(
    settings: ServerSettings, *, store: AsyncStore, run_id: str
) -> Mapping[int, Participation]:
    """Return the participation of clients in a run; empty where cohorts don't rest on it."""
    return await store.orders.participation(run_id) if rests_on_past(settings) else {}


def opened_event(opened: Attempt) -> Event:
    """Return the event of a round that opens."""
    return event_of("round-opened", opened, clients=len(opened.orders))
