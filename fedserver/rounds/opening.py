"""An attempt at a round is opened: once there are clients enough, recorded, then handed out."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.tasks.task import Task
from fedrounds.types import WorkOrder
from fedserver.api.downloads import Downloads
from fedserver.clients.sampling import Participation
from fedserver.clients.sessions import Sessions
from fedserver.events import event_of
from fedserver.housekeeping.disk import DiskWatch
from fedserver.models.checkpoints import Checkpoints, GlobalModel
from fedserver.numbers import numbers_text
from fedserver.phases import OrderState, Phase
from fedserver.records import Adjustments, Event, Round, Standing
from fedserver.rounds.open_orders import OpenOrders, OpenRound
from fedserver.rounds.planning import (
    Clients,
    admission_limits,
    idle_clients,
    plan_more,
    plan_round,
    rests_on_past,
    stale_before,
    work_orders,
)
from fedserver.rounds.rollback import first_model
from fedserver.run_context import RunContext
from fedserver.runtime import Threads
from fedserver.store import AsyncStore

logger = logging.getLogger(__name__)


class Opener:
    """Opens attempts and hands their orders out; knows which order of each client counted last."""

    def __init__(
        self,
        context: RunContext,
        task: Task,
        *,
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
        self._tick_s = tick_s
        self._sessions = sessions
        self._open_orders = open_orders
        self._store = store
        self._checkpoints = checkpoints
        self._downloads = downloads
        self._disk = disk
        self._threads = threads
        self.last_counted: dict[int, str] = {}

    async def look_back(self) -> None:
        """Ask the store which order of each client counted last.

        In an asynchronous run a client gets an order before it is known whether its last one
        counts: a stored one is as good.
        """
        self.last_counted = await self._store.last_counted_orders(
            self._context.run_id,
            stored_too=self._context.is_asynchronous,
        )

    async def open_next(
        self, ended: Round, base: GlobalModel, *, attempt: int
    ) -> tuple[Round, GlobalModel]:
        """Open the attempt that follows one that has ended, and return it with its base."""
        adjustments = ended.adjustments_after
        if adjustments.num_redraws > ended.adjustments.num_redraws:
            base = await first_model(
                self._task,
                self._context.settings,
                num_redraws=adjustments.num_redraws,
                checkpoints=self._checkpoints,
                threads=self._threads,
            )
        number = ended.round_number + (ended.phase is Phase.DONE)
        return await self.open(number, base, adjustments, attempt=attempt), base

    async def open(
        self, round_number: int, base: GlobalModel, adjustments: Adjustments, *, attempt: int = 1
    ) -> Round:
        """Wait until there are clients enough, then open the round."""
        said: set[int] | None = None
        while True:
            await self._disk.tell()
            planned = await self.plan(
                round_number,
                attempt=attempt,
                base=base,
                adjustments=adjustments,
                standings=await self._store.standings(self._context.run_id),
            )
            if planned is not None:
                break
            here = self._sessions.ready_clients(only_live=True)
            needed = self._context.settings.clients_needed
            self._open_orders.clients_here = len(here) if len(here) < needed else None
            if here != said and not self._disk.is_low():
                gone = f"; gone: client {numbers_text(said - here)}" if said and said - here else ""
                logger.info("waiting for clients: %d of %d are here%s", len(here), needed, gone)
                said = here
            await self._sessions.changed.wait(self._tick_s)
        self._open_orders.clients_here = None
        happened = opened_event(planned)
        await self._store.open_round(
            planned,
            happened,
            stale_before=stale_before(self._context.settings, round_number),
        )
        failpoint(FailPoint.ROUND_OPENED)
        await self.hand_out(planned, base)
        return planned

    async def plan(
        self,
        round_number: int,
        *,
        attempt: int,
        base: GlobalModel,
        adjustments: Adjustments,
        standings: Mapping[int, Standing],
    ) -> Round | None:
        """Return the round to open, or None while there are too few clients or too little disk."""
        past = await self._past()
        if self._disk.is_low():
            return None
        return plan_round(
            self._context,
            round_number,
            attempt=attempt,
            base=base,
            adjustments=adjustments,
            clients=self._clients(
                standings, past, only_live=not self._context.settings.require_all
            ),
        )

    def _clients(
        self,
        standings: Mapping[int, Standing],
        past: Mapping[int, Participation],
        *,
        only_live: bool = True,
    ) -> Clients:
        """Return who may be asked now: clients come and go while the store is awaited."""
        return Clients(
            ready=self._sessions.ready_clients(only_live=only_live),
            num_examples=self._sessions.data_sizes(),
            orders=self._open_orders.list_all(),
            standings=standings,
            past=past,
        )

    async def _past(self) -> Mapping[int, Participation]:
        if not rests_on_past(self._context.settings):
            return {}
        return await self._store.participation(self._context.run_id)

    async def hand_out(self, opened: Round, base: GlobalModel) -> None:
        """Give the orders of a round that is recorded to those who ask.

        Raises:
            StorageDamaged: a model that orders of earlier rounds began with isn't what was written.
            NotFound: it is gone.
        """
        is_asynchronous = self._context.is_asynchronous
        carried_over = await self._carried_over(opened) if is_asynchronous else []
        self._downloads.publish(base.digest)
        self._open_orders.open_round(
            opened,
            base=base,
            limits=admission_limits(
                self._context.settings, opened, strategy=self._context.strategy
            ),
            orders=self._work_orders(opened, base),
            carried_over=carried_over,
        )

    async def give_more(self) -> bool:
        """Give further orders in an asynchronous round that collects, up to --concurrency.

        Returns whether its buffer can still be filled: somebody is at work, or may come.
        """
        open_orders = self._open_orders
        assert open_orders.current is not None
        most = self._context.settings.concurrency
        # Again and again, since somebody may have become idle meanwhile.
        while not most or len(open_orders.list_open()) < most:
            here = self._sessions.ready_clients(only_live=True)
            if self._disk.is_low() or not idle_clients(here, open_orders.list_all()):
                break
            record, base = open_orders.current.record, open_orders.current.base
            standings = await self._store.standings(record.run_id)
            past = await self._past()
            if self._disk.is_low():
                break
            more = plan_more(self._context, record, self._clients(standings, past))
            if not more:
                break
            await self._store.add_orders(record, more)
            self.note_stored()
            open_orders.add_orders(
                replace(record, orders=(*record.orders, *more)),
                self._work_orders(replace(record, orders=more), base),
            )
        is_anybody_here = bool(self._sessions.ready_clients(only_live=True))
        return bool(open_orders.list_open()) or not is_anybody_here or self._disk.is_low()

    def note_stored(self) -> None:
        """Take over from the open orders whose updates were stored in an asynchronous round."""
        for one in self._open_orders.list_all():
            if one.state is OrderState.STORED:
                self.last_counted[one.order.client_id] = one.order.order_id

    def _work_orders(self, opened: Round, base: GlobalModel) -> list[WorkOrder]:
        return work_orders(
            *(self._context.settings, opened, base, self.last_counted),
            algorithm=self._context.strategy.client_algorithm,
        )

    async def _carried_over(self, opened: Round) -> list[tuple[OpenRound, list[WorkOrder]]]:
        known = {
            (one.given_in.record.round_number, one.given_in.record.attempt): one.given_in
            for one in self._open_orders.list_all()
        }
        found = []
        for record in await self._store.carried_over(opened):
            given_in = known.get((record.round_number, record.attempt))
            if given_in is None:
                base = await self._threads.on_disk(self._checkpoints.load, record.base_digest)
                given_in = OpenRound(
                    record=record,
                    base=base,
                    limits=admission_limits(
                        self._context.settings, record, strategy=self._context.strategy
                    ),
                    # Nobody asks how long ago: only the round that collects has a deadline.
                    opened_at=0.0,
                )
            given_in = replace(given_in, record=record)
            found.append((given_in, self._work_orders(record, given_in.base)))
        return found


def opened_event(opened: Round) -> Event:
    """Return what is told of a round that opens."""
    return event_of("round-opened", opened, clients=len(opened.orders))
