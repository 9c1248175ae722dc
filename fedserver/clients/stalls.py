"""What happens when a client dies or stalls: when its order is given up, and how the order ends.

A client that works on an order has stalled if

- it is silent for `silence_s`: no call of its session, no byte of its payload; or
- it isn't silent but makes no progress for ten times its own longest step so far, and at least for
  `silence_s`; before it has finished two steps, for `first_step_s`; or
- it takes longer in all than its order can honestly take: `first_step_s`, and the time that its
  examples and bytes take at the slowest rates that the server accepts. A client registers its
  own number of examples; more than a hundred times the median of all clients aren't believed.

A step is the time between two reports of which the second counts more batches or replays than the
first; bytes are progress too. So a client with a long batch hasn't stalled, a site with a hundred
times the data has a hundred times the time, and a client that makes tiny progress for ever ends at
the third rule.

An order that nobody has pulled is lost when the lease of its client's session ends, and after
`first_step_s` even if the lease goes on. Its time doesn't count while its session works on another
order: one process may serve many clients in turn.

An order that is given up ends ABANDONED, and its client is suspended (fedserver.suspension). A
client that says goodbye loses its order without that (fedserver.clients.departures).

Times are of a monotonic clock that stands still while the server is away (fedserver.runtime). The
time that a client waits for the server itself, such as for a slot for its upload, doesn't count.
"""

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.types import EVALUATION_BATCH_SIZE, IncidentKind, WorkOrder
from fedserver.clients.departures import abandon_for_departure, stop_expecting
from fedserver.clients.open_orders import OpenOrder, OpenOrders
from fedserver.clients.sessions import Sessions
from fedserver.events import event_of
from fedserver.phases import OrderState
from fedserver.settings import ServerSettings
from fedserver.store import AsyncStore

_STEP_MULTIPLE = 10
"""A client may take so many times its longest step so far."""

_MAX_DATA_RATIO = 100
_MIN_COMPARED = 4
_NUM_TRANSFERS = 3
"""A model comes down, and an update of at most two models' bytes (SCAFFOLD's) goes up."""


class Stall(StrEnum):
    """Why the server doesn't wait for an order any longer."""

    GONE = "gone"
    """The lease of its client's session ended before the order was pulled."""
    NEVER_PULLED = "never-pulled"
    SILENT = "silent"
    NO_PROGRESS = "no-progress"
    TOO_LONG = "too-long"


@dataclass(frozen=True, kw_only=True)
class StallBounds:
    """How long clients are waited for; the rates are the slowest that count as honest work."""

    silence_s: float
    first_step_s: float
    examples_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an order asks for.

    `num_examples` counts an example once for each time that it passes through the model;
    `num_bytes` is of all transfers. `step_ratio` is how many times longer a later step may be
    than an earlier step.
    """

    num_examples: float
    num_bytes: int
    step_ratio: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a client is with an order, in seconds.

    `silent_s` is the time since it was last heard of, `idle_s` since it last made progress,
    `total_s` since it pulled the order. `longest_step_s` is None before it has finished two steps.
    """

    silent_s: float
    idle_s: float
    total_s: float
    longest_step_s: float | None = None


def find_stall(progress: Progress, work: Work, bounds: StallBounds) -> Stall | None:
    """Return why the client of a pulled order has stalled, None if it hasn't."""
    if progress.silent_s > bounds.silence_s:
        return Stall.SILENT
    if progress.idle_s > idle_bound_s(progress, work, bounds):
        return Stall.NO_PROGRESS
    if progress.total_s > total_bound_s(work, bounds):
        return Stall.TOO_LONG
    return None


def idle_bound_s(progress: Progress, work: Work, bounds: StallBounds) -> float:
    """Return the seconds that a client that isn't silent may make no progress."""
    if progress.longest_step_s is None:
        return bounds.first_step_s
    longest_s = _STEP_MULTIPLE * work.step_ratio * progress.longest_step_s
    return max(bounds.silence_s, longest_s)


def total_bound_s(work: Work, bounds: StallBounds) -> float:
    """Return the seconds that an order may take in all."""
    return (
        bounds.first_step_s
        + work.num_examples / bounds.examples_per_s
        + work.num_bytes / bounds.bytes_per_s
    )


def find_loss(*, is_session_live: bool, waiting_s: float, bounds: StallBounds) -> Stall | None:
    """Return why an order that nobody has pulled is lost, None if it isn't.

    `waiting_s` is the time in which its client could have pulled it.
    """
    if not is_session_live:
        return Stall.GONE
    if waiting_s > bounds.first_step_s:
        return Stall.NEVER_PULLED
    return None


def stall_bounds(settings: ServerSettings) -> StallBounds:
    """Return the bounds that the settings name."""
    return StallBounds(
        silence_s=settings.stall_after,
        first_step_s=settings.first_step,
        examples_per_s=settings.min_examples_per_s,
        bytes_per_s=settings.min_bytes_per_s,
    )


def work_of(order: WorkOrder, *, num_examples: float) -> Work:
    """Return the work that an order is for a client with `num_examples` examples.

    A client algorithm may train a model of the client's own as long again, and evaluate it too.
    """
    num_models = 1 if order.training.client_algorithm is None else 2
    passes = num_models * (order.training.epochs + order.evaluate)
    return Work(
        num_examples=passes * num_examples,
        num_bytes=_NUM_TRANSFERS * sum(section.size_bytes for section in order.sections),
        step_ratio=(
            max(1.0, order.training.batch_size / EVALUATION_BATCH_SIZE) if order.evaluate else 1.0
        ),
    )


def most_credible_examples(sizes: Collection[int]) -> float:
    """Return the largest number of examples that counts for the time an order may take.

    `sizes` are the numbers that the clients registered, one for each client. Fewer than four say
    nothing of each other.
    """
    if len(sizes) < _MIN_COMPARED:
        return math.inf
    return _MAX_DATA_RATIO * statistics.median(sizes)


async def give_up_orders(
    settings: ServerSettings,
    *,
    run_id: str,
    sessions: Sessions,
    open_orders: OpenOrders,
    store: AsyncStore,
) -> None:
    """End the open orders whose clients have stalled, are lost, or have left."""
    bounds = stall_bounds(settings)
    most_examples = most_credible_examples(sessions.data_sizes().values())
    busy = {
        sessions.holder_of(order.order.client_id)
        for order in open_orders.list_open()
        if order.handed_out_at is not None
    }
    for order in open_orders.list_open():
        # An order may end while the store is awaited for an order before it: `abandon_order` asks
        # the store whether it is still open, and changes nothing if it isn't.
        client_id = order.order.client_id
        if (holder := sessions.holder_of(client_id)) is None:
            fields = {"reason": "not here any more"}
            await abandon_for_departure(
                order, fields, run_id=run_id, open_orders=open_orders, store=store
            )
            continue
        if settings.require_all:
            continue
        if (away_s := sessions.away_s(client_id)) is not None:
            if away_s > settings.lease:
                await stop_expecting(
                    order,
                    away_s,
                    run_id=run_id,
                    sessions=sessions,
                    open_orders=open_orders,
                    store=store,
                )
            continue
        if order.handed_out_at is None and holder in busy:
            open_orders.note_waiting(order.order.order_id)
        why = _stall_of(order, bounds, most_examples, sessions=sessions, open_orders=open_orders)
        if why is not None:
            await _abandon(order, why, run_id=run_id, open_orders=open_orders, store=store)


def _stall_of(
    order: OpenOrder,
    bounds: StallBounds,
    most_examples: float,
    *,
    sessions: Sessions,
    open_orders: OpenOrders,
) -> Stall | None:
    client_id = order.order.client_id
    idle_s = open_orders.idle_s(order)
    if order.handed_out_at is None:
        return find_loss(
            is_session_live=sessions.has_live_holder(client_id),
            waiting_s=idle_s,
            bounds=bounds,
        )
    return find_stall(
        Progress(
            silent_s=min(idle_s, sessions.silent_s(client_id)),
            idle_s=idle_s,
            total_s=open_orders.total_s(order),
            longest_step_s=order.longest_step_s,
        ),
        work_of(order.order, num_examples=min(sessions.num_examples_of(client_id), most_examples)),
        bounds,
    )


async def _abandon(
    order: OpenOrder, why: Stall, *, run_id: str, open_orders: OpenOrders, store: AsyncStore
) -> None:
    """End an order without an update, suspend its client, and record why."""
    assert open_orders.current is not None
    is_lost = why in (Stall.GONE, Stall.NEVER_PULLED)
    given_up = event_of(
        IncidentKind.CLIENT_LOST if is_lost else IncidentKind.CLIENT_STALLED,
        open_orders.current.record,
        client_id=order.order.client_id,
        is_incident=True,
        why=why,
        idle_s=open_orders.idle_s(order),
        **({"total_s": open_orders.total_s(order)} if why is Stall.TOO_LONG else {}),
    )
    order_id = order.order.order_id
    was_open = await store.orders.abandon_order(run_id, order_id, given_up, strikes=True)
    failpoint(FailPoint.ORDER_ABANDONED)
    if was_open:
        open_orders.settle(order_id, OrderState.ABANDONED)
