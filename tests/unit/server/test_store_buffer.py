"""An asynchronous run in the store: what comes into which round, exactly once, and what stays."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedrounds.goals import LOWEST_LOSS
from fedserver.phases import ForbiddenTransition, OrderEvent, OrderState
from fedserver.records import Arrival, Attempt, Order, Refusal, Run, RunState
from fedserver.store import Store, read_history
from fedserver.verification.chain import chain_findings, row_findings
from tests.factories import begin_round, make_event, make_round, make_update

K = 2


@dataclass
class Asynchronous:
    """A run whose rounds are buffers of K updates."""

    store: Store
    run: Run
    current: Attempt

    def arrive(self, order_id: str, order_event: OrderEvent = OrderEvent.STORE) -> OrderState:
        """Let the update of an order arrive; returns the order's state afterwards."""
        state, _ = self.store.orders.record_arrival(
            self.run.run_id,
            Arrival(
                update=make_update(order_id, payload=order_id.encode()),
                order_event=order_event,
                delta_norm=1.0,
            ),
            buffer_size=K,
        )
        return state

    def close(self) -> None:
        """Close the round; what is open is carried over."""
        self.store.rounds.close_round(self.current, make_event("round-closed"), carries_over=True)

    def go_on(self, *clients: int, stale_before: int = 0) -> list[str]:
        """Finish the closed round and open the next with orders for these; returns the events."""
        number = self.current.round_number + 1
        digest = f"{number:02x}" * 32
        following = make_round(
            self.run.run_id, round_number=number, clients=clients, base_digest=digest
        )
        self.store.database.take_recorded()
        self.store.rounds.finish_round(
            self.current,
            model_digest=digest,
            next_round=following,
            stale_before=stale_before,
            events=[make_event("round-done"), make_event("round-opened")],
        )
        self.current = following
        return [event.kind for event in self.store.database.take_recorded()]

    def states(self) -> dict[str, str]:
        """Return the state of every order."""
        history = read_history(self.store, self.run)
        return {order.order_id: order.state for attempt in history for order in attempt.orders}


@pytest.fixture
def asynchronous(tmp_path: Path) -> Iterator[Asynchronous]:
    """Give a run whose first round has orders for clients 0, 1 and 2."""
    store = Store(tmp_path / "federation.sqlite")
    run, opened = begin_round(store, clients=(0, 1, 2))
    yield Asynchronous(store, run, opened)
    store.close()


def test_the_newest_of_many_orders_of_one_client_comes_last(asynchronous: Asynchronous) -> None:
    """By number, not by text: a restarted server hands out the last order."""
    store, run, first = asynchronous.store, asynchronous.run, asynchronous.current
    order_0 = first.orders[0].order_id
    for number in range(2, 12):
        again = Order(order_id=order_0.replace("-s1", f"-s{number}"), client_id=0)
        store.rounds.add_orders(first, [again])
    latest = store.rounds.latest_attempt(run.run_id)
    assert latest is not None
    numbers = [order.sequence for order in latest.orders if order.client_id == 0]
    assert numbers == list(range(1, 12))


def test_a_buffer_never_holds_more_than_its_size_and_the_rest_comes_into_the_next(
    asynchronous: Asynchronous,
) -> None:
    """A third update waits, also while the round is aggregated; then it is counted once, stale."""
    store, run, first = asynchronous.store, asynchronous.run, asynchronous.current
    order_0, order_1, order_2 = (order.order_id for order in first.orders)
    again = Order(order_id=order_0.replace("-s1", "-s2"), client_id=0)
    assert asynchronous.arrive(order_0) is OrderState.STORED
    store.rounds.add_orders(first, [again])
    assert asynchronous.arrive(order_1) is OrderState.STORED
    assert asynchronous.arrive(order_2) is OrderState.OPEN
    asynchronous.close()
    assert asynchronous.arrive(order_2) is OrderState.OPEN
    with pytest.raises(ForbiddenTransition):
        store.rounds.add_orders(first, [again])
    asynchronous.go_on(1)
    (carried,) = store.rounds.carried_over(asynchronous.current)
    assert [order.order_id for order in carried.orders] == [again.order_id, order_2]
    assert asynchronous.arrive(order_2) is OrderState.STORED
    assert asynchronous.arrive(order_2) is OrderState.STORED, "a second time changes nothing"
    assert asynchronous.arrive(again.order_id) is OrderState.STORED
    stored = store.orders.stored_updates(asynchronous.current)
    assert [(update.update.order_id, update.own_base, update.staleness) for update in stored] == [
        (again.order_id, first.base_digest, 1),
        (order_2, first.base_digest, 1),
    ]
    # What it began with must stay, its bytes too, and its client's state counts already.
    assert store.orders.updates_to_keep(run.run_id, since_round=9).keys() >= {
        order_2,
        again.order_id,
    }
    let_go = store.rounds.models_let_go(
        run.run_id, [first.base_digest], since_round=9, goal=LOWEST_LOSS
    )
    assert let_go == set()
    assert store.orders.last_counted_orders(run.run_id, stored_too=True)[0] == again.order_id
    assert store.orders.last_counted_orders(run.run_id)[0] == order_0
    asynchronous.close()
    asynchronous.go_on()
    assert asynchronous.states() == {
        order_0: "COUNTED",
        again.order_id: "COUNTED",
        order_1: "COUNTED",
        order_2: "COUNTED",
        f"{run.run_id}-r2-a1-c1-s1": "OPEN",
    }
    history = read_history(store, run)
    assert [attempt.num_carried_over for attempt in history] == [0, 2, 1]
    assert [[update.staleness for update in attempt.updates] for attempt in history[:2]] == [
        [0, 0],
        [1, 1],
    ]
    ledger = store.ledger.read_ledger(run.run_id)
    assert [*chain_findings(ledger), *row_findings(ledger)] == []


def test_an_order_ends_late_when_it_is_too_stale_and_all_do_with_the_run(
    asynchronous: Asynchronous,
) -> None:
    """On record as an incident; its update is late, and no other order is touched."""
    order_0, order_1, order_2 = (order.order_id for order in asynchronous.current.orders)
    for number in (1, 2):
        for order_id in (order_0, order_1):
            asynchronous.arrive(order_id)
        asynchronous.close()
        kinds = asynchronous.go_on(0, 1, stale_before=number)
        order_0, order_1 = (order.order_id for order in asynchronous.current.orders)
    assert kinds == ["round-done", "order-stale", "round-opened"]
    assert asynchronous.arrive(order_2) is OrderState.LATE
    assert asynchronous.states()[order_0] == "OPEN"
    asynchronous.store.runs.end_run(
        asynchronous.run.run_id, RunState.FINISHED, make_event("run-finished", round_number=None)
    )
    assert set(asynchronous.states().values()) == {"COUNTED", "LATE"}


def test_an_attempt_that_fails_ends_what_came_into_it_and_its_own_orders_alone(
    asynchronous: Asynchronous,
) -> None:
    """Orders of earlier rounds go on and come into the next attempt."""
    order_0, order_1, order_2 = (order.order_id for order in asynchronous.current.orders)
    asynchronous.arrive(order_0)
    asynchronous.arrive(order_1)
    asynchronous.close()
    asynchronous.go_on(0, 1)
    second = asynchronous.current
    own, other = (order.order_id for order in second.orders)
    asynchronous.arrive(own)
    asynchronous.store.rounds.fail_round(second, [make_event("round-failed", round_number=2)])
    assert asynchronous.arrive(order_2) is OrderState.OPEN, "there is no round to come into"
    again = make_round(
        asynchronous.run.run_id,
        round_number=2,
        attempt=2,
        clients=(0,),
        base_digest=second.base_digest,
    )
    asynchronous.store.rounds.open_round(
        again, make_event("round-opened", round_number=2, attempt=2)
    )
    assert asynchronous.arrive(order_2) is OrderState.STORED
    states = asynchronous.states()
    assert (states[own], states[other], states[order_2]) == ("ABANDONED", "ABANDONED", "STORED")


def test_a_refused_update_is_recorded_with_the_round_that_it_came_into(
    asynchronous: Asynchronous,
) -> None:
    """Its entry in the ledger names it, whichever round its order is of."""
    order_0, order_1, order_2 = (order.order_id for order in asynchronous.current.orders)
    asynchronous.arrive(order_0)
    asynchronous.arrive(order_1)
    asynchronous.close()
    asynchronous.go_on(0, 1)
    asynchronous.store.database.take_recorded()
    state, is_recorded = asynchronous.store.orders.record_arrival(
        asynchronous.run.run_id,
        Arrival(
            update=make_update(order_2),
            order_event=OrderEvent.REFUSE,
            refusal=Refusal(reason="bad", evidence={"kind": "test"}),
        ),
        buffer_size=K,
    )
    assert (state, is_recorded) == (OrderState.REFUSED, True)
    assert [event.round_number for event in asynchronous.store.database.take_recorded()] == [2]
    entry = read_history(asynchronous.store, asynchronous.run)[1]
    assert [(update.client_id, update.verdict) for update in entry.updates] == [(2, "REFUSED")]
