"""The open orders in memory: who is asked for what, and when a client counts as stalled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedrounds.types import Counters, EntryKind
from fedserver.clients.open_orders import OpenOrder, OpenOrders
from fedserver.models.checkpoints import Checkpoints
from fedserver.phases import OrderState
from tests.factories import make_limits, make_order, make_round


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands still."""
    return Clock()


@pytest.fixture
def open_orders(clock: Clock, tmp_path: Path) -> OpenOrders:
    """Give the open orders of round 1 for clients 0 and 1."""
    opened = make_round()
    base = Checkpoints(tmp_path, {"w": EntryKind.PARAMETER}).save_initial({"w": torch.zeros(1)})
    open_orders = OpenOrders(clock)
    open_orders.start_round(
        opened,
        base=base,
        limits=make_limits(),
        orders=[make_order(order.order_id, client_id=order.client_id) for order in opened.orders],
    )
    return open_orders


def order_of(open_orders: OpenOrders, client_id: int) -> OpenOrder:
    """Return the open order of a client that has one."""
    order = open_orders.open_order_of([client_id])
    assert order is not None
    return order


GROWING = ("bytes_received", "bytes_sent", "batches", "replays")


@pytest.mark.parametrize("name", GROWING)
def test_a_growing_counter_is_progress(open_orders: OpenOrders, clock: Clock, name: str) -> None:
    """Each counter by itself resets the stall clock when it grows."""
    order = order_of(open_orders, 0)
    order_id = open_orders.hand_out(order).order_id
    for count in (1, 2, 10):
        clock.now += 7
        assert open_orders.idle_s(order) == 7
        open_orders.advance(order_id, Counters(**{name: count}))
        assert open_orders.idle_s(order) == 0
    assert getattr(order.counters, name) == 10


def test_a_heartbeat_alone_is_not_progress(open_orders: OpenOrders, clock: Clock) -> None:
    """The same counters, or smaller counters after a client's restart, leave the clock going."""
    order = order_of(open_orders, 0)
    order_id = open_orders.hand_out(order).order_id
    counters = Counters(bytes_received=10, batches=5)
    open_orders.advance(order_id, counters)
    for same in (counters, Counters(), Counters(bytes_received=9, batches=5), counters):
        clock.now += 1
        open_orders.advance(order_id, same)
    assert open_orders.idle_s(order) == 4
    assert order.counters == counters
    open_orders.advance(order_id, Counters(batches=6))
    assert open_orders.idle_s(order) == 0
    assert order.counters == Counters(bytes_received=10, batches=6)


def test_the_longest_step_is_the_time_between_two_batches(
    open_orders: OpenOrders, clock: Clock
) -> None:
    """Not the time before the first step; neither bytes nor waiting for the server are steps."""
    order = order_of(open_orders, 0)
    order_id = open_orders.hand_out(order).order_id
    clock.now += 300
    open_orders.advance(order_id, Counters(batches=1, bytes_received=5))
    assert order.longest_step_s is None
    clock.now += 2
    open_orders.advance(order_id, Counters(batches=1, bytes_received=9))
    assert order.longest_step_s is None
    clock.now += 5
    open_orders.advance(order_id, Counters(batches=2, bytes_received=9))
    assert order.longest_step_s == 7
    clock.now += 3
    open_orders.note_waiting(order_id)
    clock.now += 1
    open_orders.advance(order_id, Counters(batches=2, bytes_received=9, replays=1))
    assert order.longest_step_s == 7
    assert open_orders.total_s(order) == 308


def test_a_client_that_asks_for_its_order_again_begins_anew(
    open_orders: OpenOrders, clock: Clock
) -> None:
    """Started again, it counts from 0: its first batch is progress, though it had got further."""
    order = order_of(open_orders, 0)
    order_id = open_orders.hand_out(order).order_id
    open_orders.advance(order_id, Counters(batches=900))
    clock.now += 50
    assert open_orders.hand_out(order_of(open_orders, 0)).order_id == order_id
    assert open_orders.idle_s(order) == 50
    open_orders.advance(order_id, Counters(batches=1))
    assert open_orders.idle_s(order) == 0
    assert order.longest_step_s is None
    assert open_orders.total_s(order) == 50


def test_an_order_that_its_client_left_is_as_if_it_had_not_been_given(
    open_orders: OpenOrders,
) -> None:
    """Nobody is asked for it, and its client may get another order in the same round."""
    order = order_of(open_orders, 0)
    open_orders.forget(order.order.order_id)
    assert open_orders.find(order.order.order_id) is None
    assert open_orders.open_order_of([0]) is None
    assert open_orders.states() == [OrderState.OPEN]
    open_orders.forget("no-such-order")


def test_bytes_on_the_wire_are_progress(open_orders: OpenOrders, clock: Clock) -> None:
    """What the server sees itself counts without a report; of an unknown order, for nothing."""
    order = order_of(open_orders, 0)
    clock.now += 5
    open_orders.note_bytes("no-such-order")
    open_orders.advance("no-such-order", Counters(batches=1))
    assert open_orders.idle_s(order) == 5
    open_orders.note_bytes(order.order.order_id)
    assert open_orders.idle_s(order) == 0


def test_the_clock_of_an_order_begins_when_it_is_first_handed_out(
    open_orders: OpenOrders, clock: Clock
) -> None:
    """Asked for again, an order is the same one and its clock goes on."""
    order = order_of(open_orders, 0)
    assert order.handed_out_at is None
    clock.now += 5
    first = open_orders.hand_out(order)
    assert open_orders.idle_s(order) == 0
    handed_out_at = order.handed_out_at
    clock.now += 5
    assert open_orders.hand_out(order_of(open_orders, 0)) is first
    assert open_orders.idle_s(order) == 5
    assert order.handed_out_at == handed_out_at
    assert handed_out_at is not None


def test_an_order_that_ended_is_not_handed_out_again(open_orders: OpenOrders) -> None:
    """A session with several ids gets the order that is still open, then none."""
    first = order_of(open_orders, 0)
    assert open_orders.open_order_of([0, 1]) is first
    open_orders.settle(first.order.order_id, OrderState.STORED)
    second = open_orders.open_order_of([0, 1])
    assert second is order_of(open_orders, 1)
    open_orders.settle(second.order.order_id, OrderState.REFUSED)
    assert open_orders.open_order_of([0, 1]) is None
    assert open_orders.states() == [OrderState.STORED, OrderState.REFUSED]
    assert open_orders.list_open() == []
    assert open_orders.open_order_of([99]) is None


def test_a_session_of_many_ids_ends_what_it_began_and_leaves_nobody_out(
    open_orders: OpenOrders, clock: Clock
) -> None:
    """New orders for the lowest id, as an asynchronous run gives them, come after what waits."""
    begun = order_of(open_orders, 0)
    assert open_orders.hand_out(begun).client_id == 0
    open_orders.settle(begun.order.order_id, OrderState.STORED)

    def give_another_to_client_0(number: int) -> OpenOrder:
        assert open_orders.current is not None
        clock.now += 1
        record = open_orders.current.record
        order = replace(record.orders[0], order_id=f"another-{number}")
        more = replace(record, orders=(*record.orders, order))
        open_orders.add_orders(more, [make_order(order.order_id, client_id=0)])
        return order_of(open_orders, 0)

    newest = give_another_to_client_0(1)
    waiting = order_of(open_orders, 1)
    assert open_orders.open_order_of([0, 1]) is waiting
    open_orders.hand_out(newest)
    clock.now += 100
    assert open_orders.open_order_of([0, 1]) is newest, (
        "asked again, a session gets what it works on"
    )
    open_orders.settle(newest.order.order_id, OrderState.STORED)
    give_another_to_client_0(2)
    assert open_orders.open_order_of([0, 1]) is waiting


def test_a_round_resumed_keeps_the_ends_of_its_orders(open_orders: OpenOrders) -> None:
    """Opened again after a restart, what the store says STORED isn't asked for a second time."""
    resumed = make_round()
    stored = replace(resumed.orders[0], state=OrderState.STORED)
    resumed = replace(resumed, orders=(stored, resumed.orders[1]))
    assert open_orders.current is not None
    open_orders.start_round(
        resumed,
        base=open_orders.current.base,
        limits=open_orders.current.limits,
        orders=[make_order(order.order_id, client_id=order.client_id) for order in resumed.orders],
    )
    assert open_orders.open_order_of([0]) is None
    assert open_orders.open_order_of([1]) is not None


def test_a_closed_round_hands_out_nothing(open_orders: OpenOrders) -> None:
    """Between rounds there is no work, and late reports change nothing."""
    order_id = order_of(open_orders, 0).order.order_id
    open_orders.close_round()
    assert open_orders.current is None
    assert open_orders.find(order_id) is None
    assert open_orders.open_order_of([0, 1]) is None
    open_orders.settle(order_id, OrderState.STORED)
    assert open_orders.states() == []


def test_orders_carried_over_go_on_with_what_they_began_with(open_orders: OpenOrders) -> None:
    """Round 1 closes without client 1: its order is at work in round 2, however far it was."""
    first = open_orders.current
    assert first is not None
    open_order = order_of(open_orders, 1)
    order_id = open_orders.hand_out(open_order).order_id
    open_orders.advance(order_id, Counters(batches=3))
    open_orders.settle(order_of(open_orders, 0).order.order_id, OrderState.STORED)
    open_orders.close_round(carries_over=True)
    assert open_orders.find(order_id) is open_order, "also while no round collects"
    assert open_orders.states() == [OrderState.OPEN]
    second = make_round(round_number=2, clients=(0,), base_digest="cd" * 32)
    (order,) = second.orders
    open_orders.start_round(
        second,
        base=first.base,
        limits=make_limits(max_num_examples=5),
        orders=[replace(make_order(order.order_id, client_id=0), round_number=2)],
        carried_over=[(first, [open_order.order])],
    )
    carried = order_of(open_orders, 1)
    assert (carried.counters.batches, carried.given_in) == (3, first)
    record = open_orders.open_record(order_id)
    assert record is not None
    assert record.round_number == 1
    # What happens to it from now on belongs to round 2.
    assert open_orders.round_key_of(record) == (2, 1)
    assert open_orders.round_key_of(replace(record, state=OrderState.LATE)) == (1, 1)
    more = replace(order, order_id=order.order_id.replace("-s1", "-s2"))
    open_orders.settle(order.order_id, OrderState.STORED)
    open_orders.add_orders(
        replace(second, orders=(order, more)), [make_order(more.order_id, client_id=0)]
    )
    assert order_of(open_orders, 0).order.order_id == more.order_id
    # A process that serves both goes on with what it has, then with what came in first.
    assert open_orders.open_order_of([0, 1]) is carried
    assert open_orders.hand_out(order_of(open_orders, 0)).order_id == more.order_id
    open_orders.settle(order_id, OrderState.STORED)
    assert open_orders.open_order_of([0, 1]) is order_of(open_orders, 0)
    carried.state = OrderState.OPEN
    # Only what round 2 has given ends with it.
    open_orders.abandon_round(second)
    assert open_orders.open_order_of([1]) is carried
