"""An attempt at a round is opened: once there are clients enough, recorded, then handed out."""

import logging
from dataclasses import replace

from fedserver.checkpoints import GlobalModel
from fedserver.events import event_of
from fedserver.numbers import numbers_text
from fedserver.orderbook import OpenRound
from fedserver.parts import Parts
from fedserver.planning import (
    admission_limits,
    idle_clients,
    participation,
    plan_more,
    plan_round,
    stale_before,
    work_orders,
)
from fedserver.records import Adjustments, Event, Round
from fedserver.rollback import first_model
from fedserver.rounds import OrderState, Phase
from shared.failpoints import FailPoint, pass_by
from shared.tasks import Task
from shared.types import WorkOrder

logger = logging.getLogger(__name__)


class Opener:
    """Opens attempts and hands their orders out; knows which order of each client counted last."""

    def __init__(self, parts: Parts, task: Task, *, tick_s: float) -> None:
        self._parts = parts
        self._task = task
        self._tick_s = tick_s
        self.last_counted: dict[int, str] = {}

    async def look_back(self) -> None:
        """Ask the store which order of each client counted last.

        In an asynchronous run a client gets an order before it is known whether its last one
        counts: a stored one is as good.
        """
        self.last_counted = await self._parts.store.last_counted_orders(
            self._parts.run.run_id,
            stored_too=self._parts.strategy.buffer_size > 0,
        )

    async def open_next(
        self, ended: Round, base: GlobalModel, *, attempt: int
    ) -> tuple[Round, GlobalModel]:
        """Open the attempt that follows one that has ended, and return it with its base."""
        adjustments = ended.adjustments_after
        if adjustments.num_redraws > ended.adjustments.num_redraws:
            base = await first_model(self._parts, self._task, num_redraws=adjustments.num_redraws)
        number = ended.round_number + (ended.phase is Phase.DONE)
        return await self.open(number, base, adjustments, attempt=attempt), base

    async def open(
        self, round_number: int, base: GlobalModel, adjustments: Adjustments, *, attempt: int = 1
    ) -> Round:
        """Wait until there are clients enough, then open the round."""
        said: set[int] | None = None
        run_id = self._parts.run.run_id
        while True:
            await self._parts.disk.tell()
            standings = await self._parts.store.standings(run_id)
            planned = plan_round(
                *(self._parts, round_number),
                attempt=attempt,
                base=base,
                adjustments=adjustments,
                standings=standings,
                past=await participation(self._parts),
            )
            if planned is not None:
                break
            here = self._parts.sessions.ready_clients(only_live=True)
            needed = self._parts.settings.clients_needed
            self._parts.book.clients_here = len(here) if len(here) < needed else None
            if here != said and not self._parts.disk.is_low():
                gone = f"; gone: client {numbers_text(said - here)}" if said and said - here else ""
                logger.info("waiting for clients: %d of %d are here%s", len(here), needed, gone)
                said = here
            await self._parts.sessions.changed.wait(self._tick_s)
        self._parts.book.clients_here = None
        happened = opened_event(planned)
        await self._parts.store.open_round(
            planned,
            happened,
            stale_before=stale_before(self._parts.settings, round_number),
        )
        pass_by(FailPoint.ROUND_OPENED)
        await self.hand_out(planned, base)
        return planned

    async def hand_out(self, opened: Round, base: GlobalModel) -> None:
        """Give the orders of a round that is recorded to those who ask.

        Raises:
            StorageDamaged: a model that orders of earlier rounds began with isn't what was written.
            NotFound: it is gone.
        """
        is_asynchronous = self._parts.strategy.buffer_size > 0
        carried_over = await self._carried_over(opened) if is_asynchronous else []
        self._parts.downloads.publish(base.digest)
        self._parts.book.open_round(
            opened,
            base=base,
            limits=admission_limits(self._parts.settings, opened, strategy=self._parts.strategy),
            orders=self._work_orders(opened, base),
            carried_over=carried_over,
        )

    async def give_more(self) -> bool:
        """Give further orders in an asynchronous round that collects, up to --concurrency.

        Returns whether its buffer can still be filled: somebody is at work, or may come.
        """
        parts, book = self._parts, self._parts.book
        assert book.current is not None
        most = parts.settings.concurrency
        # Again and again, since somebody may have become idle meanwhile.
        while not most or len(book.open_orders()) < most:
            if not idle_clients(parts):
                break
            record, base = book.current.record, book.current.base
            standings = await parts.store.standings(record.run_id)
            past = await participation(parts)
            more = plan_more(parts, standings=standings, past=past)
            if not more:
                break
            await parts.store.add_orders(record, more)
            self.note_stored()
            book.add_orders(
                replace(record, orders=(*record.orders, *more)),
                self._work_orders(replace(record, orders=more), base),
            )
        is_anybody_here = bool(parts.sessions.ready_clients(only_live=True))
        return bool(book.open_orders()) or not is_anybody_here or parts.disk.is_low()

    def note_stored(self) -> None:
        """Take over from the order book whose orders were stored in an asynchronous round."""
        for one in self._parts.book.orders():
            if one.state is OrderState.STORED:
                self.last_counted[one.order.client_id] = one.order.order_id

    def _work_orders(self, opened: Round, base: GlobalModel) -> list[WorkOrder]:
        return work_orders(
            *(self._parts.settings, opened, base, self.last_counted),
            local=self._parts.strategy.local,
        )

    async def _carried_over(self, opened: Round) -> list[tuple[OpenRound, list[WorkOrder]]]:
        parts = self._parts
        known = {
            (one.given_in.record.round_number, one.given_in.record.attempt): one.given_in
            for one in parts.book.orders()
        }
        found = []
        for record in await parts.store.carried_over(opened):
            given_in = known.get((record.round_number, record.attempt))
            if given_in is None:
                base = await parts.workers.on_disk(parts.checkpoints.load, record.base_digest)
                given_in = OpenRound(
                    record=record,
                    base=base,
                    limits=admission_limits(parts.settings, record, strategy=parts.strategy),
                    # Nobody asks how long ago: only the round that collects has a deadline.
                    opened_at=0.0,
                )
            given_in = replace(given_in, record=record)
            found.append((given_in, self._work_orders(record, given_in.base)))
        return found


def opened_event(opened: Round) -> Event:
    """Return what is told of a round that opens."""
    return event_of("round-opened", opened, clients=len(opened.orders))
