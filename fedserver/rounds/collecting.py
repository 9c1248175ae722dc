"""A round collects: it waits for updates until it may close, or has to fail.

How it collects is a policy, chosen once for a run. A synchronous round, here, asks its cohort and
waits for it. An asynchronous round (fedserver.rounds.asynchronous) fills a buffer.
"""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedrounds.types import RunFailure, WorkOrder
from fedserver.clients.open_orders import OpenOrder, OpenOrders, OpenRound
from fedserver.clients.sessions import Sessions
from fedserver.clients.stalls import give_up_orders
from fedserver.models.evaluation import Evaluations
from fedserver.numbers import numbers_text
from fedserver.phases import OrderState, RoundEvent, due_event, shortfall
from fedserver.quorum import cohort_size, updates_to_close, updates_to_count
from fedserver.records import Attempt, Exclusion, StoredUpdate
from fedserver.rounds.last_counted import LastCounted
from fedserver.run_context import RunContext
from fedserver.settings import ServerSettings
from fedserver.store import AsyncStore


@dataclass(frozen=True, kw_only=True)
class Due:
    """The event that is due for a round that collects: CLOSE, or FAIL for a reason."""

    event: RoundEvent
    reason: str = ""
    failure: RunFailure = RunFailure.TOO_FEW_UPDATES


class Collecting(Protocol):
    """How the rounds of a run collect updates."""

    @property
    def carries_over(self) -> bool:
        """Whether orders that are open when a round closes go on in the next round."""

    @property
    def max_at_work(self) -> int:
        """The number of clients that may be at work at a time; 0: all."""

    async def due(self, current: Attempt) -> Due | None:
        """Return the event that is due for a round, or None to wait. May give further orders."""

    def updates_to_count(self, closed: Attempt) -> int:
        """Return the number of updates that must be left after screening."""

    async def carried_over(self, opened: Attempt) -> list[tuple[OpenRound, Sequence[WorkOrder]]]:
        """Return the orders of earlier attempts that go on in a round that opens."""

    def note_closed(self) -> None:
        """Take note that a round is recorded as closed; its orders are still in memory."""

    async def note_finished(
        self, counted: Sequence[StoredUpdate], exclusions: Sequence[Exclusion]
    ) -> None:
        """Take note that a round is recorded as done, before the next round's orders are made."""

    async def note_failed(self) -> None:
        """Take note that an attempt is recorded as failed."""


class SynchronousCollecting:
    """A round asks its cohort once, and waits until enough answer or the rest has stalled."""

    carries_over = False

    def __init__(
        self,
        context: RunContext,
        *,
        last_counted: LastCounted,
        open_orders: OpenOrders,
        store: AsyncStore,
    ) -> None:
        self._settings = context.settings
        self._last_counted = last_counted
        self._open_orders = open_orders
        self._store = store
        self.max_at_work = cohort_size(context.settings)

    async def due(self, current: Attempt) -> Due | None:
        """See `Collecting`; the rule is `due_event`."""
        settings, open_orders = self._settings, self._open_orders
        states, needed = (
            open_orders.states(),
            updates_to_close(settings, num_orders=len(current.orders)),
        )
        deadline_s = settings.round_deadline
        event = due_event(
            states,
            min_updates=needed,
            closes_early=settings.over_select > 1,
            is_overdue=deadline_s is not None and open_orders.age_s() > deadline_s,
        )
        if event is None:
            return None
        if event is RoundEvent.CLOSE:
            return Due(event=event)
        num_answered = len(states) - states.count(OrderState.ABANDONED)
        return await too_few_updates(
            shortfall(states, needed),
            open_orders.list_all(),
            # There would be enough of them, had none been refused.
            is_by_refusals=num_answered >= needed,
            store=self._store,
        )

    def updates_to_count(self, closed: Attempt) -> int:
        """See `Collecting`: as many as the round needed to close, even under --require-all."""
        return updates_to_count(self._settings, num_orders=len(closed.orders))

    async def carried_over(self, opened: Attempt) -> list[tuple[OpenRound, Sequence[WorkOrder]]]:
        """See `Collecting`: none, all orders end with their round."""
        return []

    def note_closed(self) -> None:
        """See `Collecting`: what was stored may still be excluded."""

    async def note_finished(
        self, counted: Sequence[StoredUpdate], exclusions: Sequence[Exclusion]
    ) -> None:
        """See `Collecting`."""
        self._last_counted.note((update.client_id, update.update.order_id) for update in counted)

    async def note_failed(self) -> None:
        """See `Collecting`: an attempt that failed had nothing that counted."""


async def wait_until_due(
    current: Attempt,
    collecting: Collecting,
    *,
    settings: ServerSettings,
    evaluations: Evaluations,
    sessions: Sessions,
    open_orders: OpenOrders,
    store: AsyncStore,
    tick_s: float,
) -> Due | None:
    """Wait until a round has to close or to fail, and give up stalled orders meanwhile.

    Returns None as soon as the model that the round began with may be bad, or the last of the run.
    """
    looked_at = -math.inf
    while not evaluations.has_news:
        # This looks at all orders: once a tick, not after each update that comes.
        if (now := time.monotonic()) - looked_at >= tick_s:
            looked_at = now
            await give_up_orders(
                settings,
                run_id=current.run_id,
                sessions=sessions,
                open_orders=open_orders,
                store=store,
            )
        if (due := await collecting.due(current)) is not None:
            return due
        # Nothing is awaited between the policy's last look at the orders and this wait: no update
        # that comes is missed.
        await open_orders.round_changed.wait(tick_s)
    return None


async def too_few_updates(
    reason: str, orders: Sequence[OpenOrder], *, is_by_refusals: bool, store: AsyncStore
) -> Due:
    """Return the failure of a round with too few updates; the reason names refused clients.

    `is_by_refusals` says that refused updates, if there are any, are the cause.
    """
    refused = {
        order.order.client_id: order.order.order_id
        for order in orders
        if order.state is OrderState.REFUSED
    }
    if not refused:
        return Due(event=RoundEvent.FAIL, reason=reason)
    record = await store.orders.find_order(refused[min(refused)])
    return Due(
        event=RoundEvent.FAIL,
        reason=f"{reason}; {verdict_text('refused', refused, f'{record.reason}')}",
        failure=RunFailure.UPDATES_REFUSED if is_by_refusals else RunFailure.TOO_FEW_UPDATES,
    )


def verdict_text(verdict: str, clients: Collection[int], first_reason: str) -> str:
    """Return a sentence on clients whose updates were refused or excluded.

    `first_reason` is the reason for the client with the lowest id.
    """
    first = min(clients)
    if len(clients) == 1:
        return f"the update of client {first} was {verdict}: {first_reason}"
    return (
        f"the updates of clients {numbers_text(clients)} were {verdict}, that of client {first}: "
        f"{first_reason}"
    )
