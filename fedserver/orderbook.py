"""The orders of the round that collects, in memory, and those who wait for them to change.

The store is the truth; this is what long polls and the round loop look at without asking it.
Everything here runs on the event loop's thread.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from fedserver.admission import AdmissionLimits
from fedserver.checkpoints import GlobalModel
from fedserver.records import OrderRecord, Round
from fedserver.rounds import OrderState
from fedserver.signals import Signal
from shared.types import Counters, WorkOrder


@dataclass
class OpenOrder:
    """An order of the current round and how far its client is; times of the monotonic clock."""

    order: WorkOrder
    state: OrderState
    advanced_at: float
    handed_out_at: float | None = None
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True, kw_only=True)
class OpenRound:
    """The round that collects: what its orders start from and what it admits."""

    record: Round
    base: GlobalModel
    limits: AdmissionLimits
    opened_at: float

    def holds(self, order: OrderRecord) -> bool:
        """Whether an order is one of this round's."""
        ours = self.record
        return (order.run_id, order.round_number, order.attempt) == (
            ours.run_id,
            ours.round_number,
            ours.attempt,
        )


class OrderBook:
    """What is asked of whom right now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.work_changed = Signal()
        self.round_changed = Signal()
        self.current: OpenRound | None = None
        self.latest: Round | None = None
        self._clock = clock
        self._orders: dict[str, OpenOrder] = {}
        self._by_client: dict[int, OpenOrder] = {}

    def open_round(
        self,
        record: Round,
        *,
        base: GlobalModel,
        limits: AdmissionLimits,
        orders: Iterable[WorkOrder],
    ) -> None:
        """Hand these orders out from now on."""
        now = self._clock()
        states = {order.order_id: order.state for order in record.orders}
        self.latest = record
        self.current = OpenRound(record=record, base=base, limits=limits, opened_at=now)
        self._orders = {
            order.order_id: OpenOrder(order=order, state=states[order.order_id], advanced_at=now)
            for order in orders
        }
        self._by_client = {one.order.client_id: one for one in self._orders.values()}
        self.work_changed.notify()

    def close_round(self) -> None:
        """Hand nothing out any more."""
        self.current = None
        self._orders = {}
        self._by_client = {}

    def find(self, order_id: str) -> OpenOrder | None:
        """Return the order if it belongs to the round that collects."""
        return self._orders.get(order_id)

    def open_record(self, order_id: str) -> OrderRecord | None:
        """Return what the store holds of an order that is open here; None for any other."""
        found = self._orders.get(order_id)
        if self.current is None or found is None or found.state is not OrderState.OPEN:
            return None
        return OrderRecord(
            order_id=order_id,
            run_id=self.current.record.run_id,
            round_number=self.current.record.round_number,
            attempt=self.current.record.attempt,
            client_id=found.order.client_id,
            state=OrderState.OPEN,
            digest=None,
            reason=None,
        )

    def open_order_of(self, client_ids: Iterable[int]) -> OpenOrder | None:
        """Return the first open order for one of these clients."""
        for client_id in client_ids:
            found = self._by_client.get(client_id)
            if found is not None and found.state is OrderState.OPEN:
                return found
        return None

    def hand_out(self, order: OpenOrder) -> WorkOrder:
        """Return the order; its clock begins the first time."""
        if order.handed_out_at is None:
            order.handed_out_at = time.time()
            order.advanced_at = self._clock()
        return order.order

    def states(self) -> list[OrderState]:
        """Return the states of the round's orders."""
        return [one.state for one in self._orders.values()]

    def settle(self, order_id: str, state: OrderState) -> None:
        """Take over what the store recorded of an order."""
        if (found := self._orders.get(order_id)) is not None:
            found.state = state
            self.round_changed.notify()

    def advance(self, order_id: str, counters: Counters) -> None:
        """Note a client's counters; only one that grew counts as progress."""
        found = self._orders.get(order_id)
        if found is None:
            return
        before, told = asdict(found.counters), asdict(counters)
        largest = Counters(**{name: max(before[name], told[name]) for name in before})
        if largest != found.counters:
            found.counters = largest
            found.advanced_at = self._clock()

    def note_bytes(self, order_id: str) -> None:
        """Note that bytes of this order's payload went over the wire."""
        if (found := self._orders.get(order_id)) is not None:
            found.advanced_at = self._clock()

    def orders(self) -> list[OpenOrder]:
        """Return the orders of the round that collects, ended ones too."""
        return list(self._orders.values())

    def open_orders(self) -> list[OpenOrder]:
        """Return the orders without an end."""
        return [one for one in self._orders.values() if one.state is OrderState.OPEN]

    def age_s(self) -> float:
        """Return the seconds since the round that collects was opened here."""
        assert self.current is not None
        return self._clock() - self.current.opened_at

    def idle_s(self, order: OpenOrder) -> float:
        """Return the seconds since an order's client last got further."""
        return self._clock() - order.advanced_at
