"""The cause of an order's end is recorded with the end, and survives an upgrade."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from fedrounds.types import OrderEnd
from fedserver.phases import OrderEvent
from fedserver.records import NO_ADJUSTMENTS, Run, RunState
from fedserver.store import Store
from tests.factories import begin_round, make_event, make_round, make_update, record_arrival

MODEL = "ee" * 32


def ends_of(store: Store, run: Run) -> dict[str, OrderEnd | None]:
    """Return the cause of each order's end; the run's id is cut off the order ids."""
    attempts = store.ledger.read_ledger(run.run_id).attempts
    opened = [
        make_round(run.run_id, round_number=row.round_number, attempt=row.attempt, clients=range(4))
        for row in attempts
    ]
    return {
        order.order_id.removeprefix(f"{run.run_id}-"): store.orders.find_order_end(order.order_id)
        for attempt in opened
        for order in attempt.orders
    }


def end_orders(store: Store) -> Run:
    """Begin a run with three attempts whose orders end in every way, and end it."""
    run, failed = begin_round(store, clients=range(4))
    # At the very moment at which the attempt fails, as far as the clock can tell.
    event = make_event("round-failed")
    store.orders.abandon_order(run.run_id, failed.orders[0].order_id, event)
    record_arrival(store, run, make_update(failed.orders[1].order_id))
    refused = make_update(failed.orders[2].order_id)
    record_arrival(store, run, refused, OrderEvent.REFUSE, reason="its loss is nan")
    store.rounds.fail_round(failed, [event])

    done = make_round(run.run_id, attempt=2, clients=range(4))
    store.rounds.open_round(done, make_event("round-opened", attempt=2))
    for order in done.orders[:2]:
        record_arrival(store, run, make_update(order.order_id))
    missed = make_update(done.orders[2].order_id)
    record_arrival(store, run, missed, OrderEvent.MISS)
    store.rounds.close_round(done, make_event("round-closed", attempt=2))
    taken_back = make_round(run.run_id, round_number=2, clients=range(4), base_digest=MODEL)
    store.rounds.finish_round(
        done,
        model_digest=MODEL,
        next_round=taken_back,
        events=[make_event("round-done"), make_event("round-opened", round_number=2)],
    )
    store.rounds.roll_back(
        replace(done, model_digest=MODEL),
        [make_event("round-rolled-back")],
        adjustments_after=NO_ADJUSTMENTS,
        abandoned=taken_back,
    )
    last = make_round(run.run_id, attempt=3, clients=range(4))
    store.rounds.open_round(last, make_event("round-opened", attempt=3))
    record_arrival(store, run, make_update(last.orders[0].order_id))
    store.runs.end_run(run.run_id, RunState.FAILED, make_event("run-failed"))
    return run


ENDS = {
    "r1-a1-c0-s1": OrderEnd.GIVEN_UP,
    "r1-a1-c1-s1": OrderEnd.ATTEMPT_FAILED,
    "r1-a1-c2-s1": OrderEnd.OTHER,
    "r1-a1-c3-s1": OrderEnd.ATTEMPT_FAILED,
    "r1-a2-c0-s1": OrderEnd.OTHER,
    "r1-a2-c1-s1": OrderEnd.OTHER,
    "r1-a2-c2-s1": OrderEnd.ROUND_CLOSED,
    "r1-a2-c3-s1": OrderEnd.ROUND_CLOSED,
    **{f"r2-a1-c{client_id}-s1": OrderEnd.TAKEN_BACK for client_id in range(4)},
    "r1-a3-c0-s1": None,
    **{f"r1-a3-c{client_id}-s1": OrderEnd.GIVEN_UP for client_id in range(1, 4)},
}


def test_the_cause_of_an_end_is_recorded_with_it(tmp_path: Path) -> None:
    """Its time doesn't decide: an order that is given up as its attempt fails was given up."""
    store = Store(tmp_path / "federation.sqlite")
    assert ends_of(store, end_orders(store)) == ENDS
    store.close()


def test_orders_that_ended_before_the_upgrade_get_the_cause_of_their_end(tmp_path: Path) -> None:
    """Schema 9 had the times alone, so the order given up as its attempt failed failed with it."""
    path = tmp_path / "federation.sqlite"
    store = Store(path)
    run = end_orders(store)
    store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE orders DROP COLUMN order_end")
        connection.execute("ALTER TABLE updates DROP COLUMN measurements")
        connection.execute("UPDATE alembic_version SET version_num = '0009'")
        connection.commit()
    store = Store(path, upgrades=True)
    assert ends_of(store, run) == ENDS | {"r1-a1-c0-s1": OrderEnd.ATTEMPT_FAILED}
    store.close()
