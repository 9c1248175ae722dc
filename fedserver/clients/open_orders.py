"""The open orders in memory, for the long polls and the round loop, which wait for changes here.

The store is the truth: what is noted here was recorded first, or is made from the store at the
start. Everything here runs on the event loop's thread.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from fedrounds.types import Counters, WorkOrder
from fedserver.models.checkpoints import GlobalModel
from fedserver.phases import OrderState
from fedserver.records import Attempt, OrderRecord
from fedserver.runtime import Broadcast
from fedserver.updates.admission import AdmissionLimits


@dataclass
class OpenOrder:
    """An order and how far its client is. Times are of `OpenOrders`' clock, except `handed_out_at`.

    `given_in` is the attempt that gave it: the attempt that collects, or in an asynchronous run an
    earlier attempt. `handed_out_at` is the time of day at which it was first pulled, `began_at` the
    same moment by the clock. `stepped_at` is when the client last finished a step (see
    fedserver.clients.stalls), `longest_step_s` the longest time between two steps, None before the
    second step.
    """

    order: WorkOrder
    given_in: "OpenRound"
    state: OrderState
    advanced_at: float
    handed_out_at: float | None = None
    handed_out_s: float = 0.0
    began_at: float | None = None
    stepped_at: float | None = None
    longest_step_s: float | None = None
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True, kw_only=True)
class OpenRound:
    """A round that is open: the model its orders start from, and the limits of their updates.

    `record` has the orders that were given when it opened, or when it was read from the store.
    """

    record: Attempt
    base: GlobalModel
    limits: AdmissionLimits
    opened_at: float


class OpenOrders:
    """The orders that are at work, and those that ended in the round that collects."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.work_changed = Broadcast()
        self.round_changed = Broadcast()
        self.current: OpenRound | None = None
        self.latest: Attempt | None = None
        self.clients_here: int | None = None
        """The number of clients that are here while they are too few to open a round, else None."""
        self._clock = clock
        self._orders: dict[str, OpenOrder] = {}
        self._by_client: dict[int, OpenOrder] = {}

    def start_round(
        self,
        record: Attempt,
        *,
        base: GlobalModel,
        limits: AdmissionLimits,
        orders: Iterable[WorkOrder],
        carried_over: Iterable[tuple[OpenRound, Sequence[WorkOrder]]] = (),
    ) -> None:
        """Hand these orders out from now on, and those that are carried over from earlier rounds.

        A carried order that is in memory keeps its state: how far its client is.
        """
        known = self._orders
        self.latest = record
        self.current = OpenRound(record=record, base=base, limits=limits, opened_at=self._clock())
        self._orders = {}
        for given_in, carried in carried_over:
            self._take_in(given_in, carried, known)
        self._take_in(self.current, orders, known={})
        self.work_changed.notify()

    def add_orders(self, record: Attempt, orders: Iterable[WorkOrder]) -> None:
        """Hand out further orders of the round that collects, which has become `record`."""
        assert self.current is not None
        self.latest = record
        self.current = replace(self.current, record=record)
        self._take_in(self.current, orders, known={})
        self.work_changed.notify()

    def _take_in(
        self, given_in: OpenRound, orders: Iterable[WorkOrder], known: Mapping[str, OpenOrder]
    ) -> None:
        states = {order.order_id: order.state for order in given_in.record.orders}
        for order in orders:
            self._orders[order.order_id] = known.get(order.order_id) or OpenOrder(
                order=order,
                given_in=given_in,
                state=states[order.order_id],
                advanced_at=self._clock(),
            )
        self._by_client = {order.order.client_id: order for order in self._orders.values()}

    def close_round(self, *, carries_over: bool = False) -> None:
        """Hand out no further orders; open orders end with the round, or are carried over."""
        self.current = None
        self._keep(self.list_open() if carries_over else [])

    def abandon_round(self, abandoned: Attempt) -> None:
        """End an attempt and the orders it has given; those that it didn't give go on."""
        self.current = None
        ended = (abandoned.round_number, abandoned.attempt)
        self._keep(
            [
                order
                for order in self.list_open()
                if (order.order.round_number, order.order.attempt) != ended
            ]
        )

    def _keep(self, kept: Sequence[OpenOrder]) -> None:
        self._orders = {order.order.order_id: order for order in kept}
        self._by_client = {order.order.client_id: order for order in kept}

    def find(self, order_id: str) -> OpenOrder | None:
        """Return the order if it is at work, or has ended in the round that collects."""
        return self._orders.get(order_id)

    def open_record(self, order_id: str) -> OrderRecord | None:
        """Return the store's record of an order that is open here; None for any other."""
        order = self._orders.get(order_id)
        if order is None or order.state is not OrderState.OPEN:
            return None
        return OrderRecord(
            order_id=order_id,
            run_id=order.given_in.record.run_id,
            round_number=order.order.round_number,
            attempt=order.order.attempt,
            client_id=order.order.client_id,
            state=OrderState.OPEN,
            digest=None,
            reason=None,
        )

    def round_key_of(self, record: OrderRecord) -> tuple[int, int]:
        """Return the round and attempt to which a new event of an order belongs.

        That is the attempt that collects while the order is open, and its own attempt afterwards.
        """
        if record.state is OrderState.OPEN and self.latest is not None:
            return self.latest.round_number, self.latest.attempt
        return record.round_number, record.attempt

    def open_order_of(self, client_ids: Iterable[int]) -> OpenOrder | None:
        """Return the open order that the session of these clients is to work on next, if any.

        That is the order it has pulled already, else the order that has waited longest: where a
        client that has answered gets a new order at once, the others have their turn all the same.
        """
        orders = (self._by_client.get(client_id) for client_id in client_ids)
        return min(
            (order for order in orders if order is not None and order.state is OrderState.OPEN),
            key=lambda order: (
                order.handed_out_at is None,
                order.handed_out_s or order.advanced_at,
            ),
            default=None,
        )

    def hand_out(self, order: OpenOrder) -> WorkOrder:
        """Return the order; its clock begins the first time.

        A client that asks again begins anew, and so do its counters.
        """
        if order.handed_out_at is None:
            order.handed_out_at, order.handed_out_s = time.time(), time.monotonic()
            order.began_at = order.advanced_at = self._clock()
        order.counters = Counters()
        order.stepped_at = None
        return order.order

    def states(self) -> list[OrderState]:
        """Return the states of the orders at work, and of those that ended in this round."""
        return [order.state for order in self._orders.values()]

    def settle(self, order_id: str, state: OrderState) -> None:
        """Take over what the store recorded of an order."""
        if (order := self._orders.get(order_id)) is not None:
            order.state = state
            self.round_changed.notify()

    def forget(self, order_id: str) -> None:
        """Drop an order that has ended with its client's departure, as if it had not been given.

        A client that comes back may then get another order in the same round.
        """
        if (ended := self._orders.pop(order_id, None)) is not None:
            if self._by_client.get(ended.order.client_id) is ended:
                del self._by_client[ended.order.client_id]
            self.round_changed.notify()

    def advance(self, order_id: str, counters: Counters) -> None:
        """Note a client's counters; only a counter that grew is progress."""
        order = self._orders.get(order_id)
        if order is None:
            return
        # Reports of one client may overtake each other: no counter ever goes back.
        before, reported = asdict(order.counters), asdict(counters)
        largest = Counters(**{name: max(before[name], reported[name]) for name in before})
        if largest == order.counters:
            return
        now = self._clock()
        if largest.batches > order.counters.batches or largest.replays > order.counters.replays:
            if order.stepped_at is not None:
                order.longest_step_s = max(order.longest_step_s or 0.0, now - order.stepped_at)
            order.stepped_at = now
        order.counters = largest
        order.advanced_at = now

    def note_bytes(self, order_id: str) -> None:
        """Note that bytes of this order's payload went over the wire."""
        if (order := self._orders.get(order_id)) is not None:
            order.advanced_at = self._clock()

    def note_waiting(self, order_id: str) -> None:
        """Note that this order's client has waited for the server since it last made progress."""
        if (order := self._orders.get(order_id)) is None:
            return
        now = self._clock()
        waited_s = now - order.advanced_at
        order.advanced_at = now
        # The wait is left out of the order's total time and of the step it falls into.
        if order.began_at is not None:
            order.began_at += waited_s
        if order.stepped_at is not None:
            order.stepped_at += waited_s

    def list_all(self) -> list[OpenOrder]:
        """Return the orders at work, and those that ended in the round that collects."""
        return list(self._orders.values())

    def list_open(self) -> list[OpenOrder]:
        """Return the orders without an end."""
        return [order for order in self._orders.values() if order.state is OrderState.OPEN]

    def age_s(self) -> float:
        """Return the seconds since the round that collects was opened here."""
        assert self.current is not None
        return self._clock() - self.current.opened_at

    def total_s(self, order: OpenOrder) -> float:
        """Return the seconds since an order was first pulled, without those of waiting for us."""
        return 0.0 if order.began_at is None else self._clock() - order.began_at

    def idle_s(self, order: OpenOrder) -> float:
        """Return the seconds since an order's client last got further."""
        return self._clock() - order.advanced_at
