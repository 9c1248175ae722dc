"""The store's transitions: each is one transaction, recorded as a whole or not at all."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import StatementError

from fedrounds.errors import NotFound
from fedserver import ledger
from fedserver.phases import ForbiddenTransition, OrderEvent, OrderState, Phase
from fedserver.records import (
    Arrival,
    Attempt,
    Event,
    HeldState,
    ModelEvaluation,
    Refusal,
    Run,
    RunState,
)
from fedserver.reporting.as_json import attempt_json
from fedserver.store import Store, read_history
from tests.factories import (
    DIGEST,
    begin_round,
    make_event,
    make_round,
    make_session,
    make_update,
    record_arrival,
    store_updates,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the place of a database."""
    return tmp_path / "federation.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Give an empty store."""
    opened = Store(path)
    yield opened
    opened.close()


def states_of(store: Store, opened: Attempt) -> list[OrderState]:
    """Return the states of a round's orders, as the database holds them."""
    return [store.orders.find_order(order.order_id).state for order in opened.orders]


def finish(store: Store, run: Run, opened: Attempt, *, following: Attempt | None = None) -> None:
    """Close the round and finish it with what it has."""
    store.rounds.close_round(opened, make_event("round-closed"))
    events = [make_event("round-done")]
    if following is not None:
        events.append(make_event("round-opened", round_number=following.round_number))
    store.rounds.finish_round(
        opened,
        model_digest="ee" * 32,
        next_round=following,
        events=events,
    )


def dump(path: Path) -> list[str]:
    """Return everything the database holds, as SQL, read by SQLite itself."""
    connection = sqlite3.connect(path)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def test_an_update_is_recorded_with_its_order(store: Store) -> None:
    """STORE puts the update on record and moves the order; asked again, nothing more happens."""
    run, opened = begin_round(store)
    update = make_update(opened.orders[1].order_id, num_examples=7)
    assert record_arrival(store, run, update) == (OrderState.STORED, True)
    assert [stored.update for stored in store.orders.stored_updates(opened)] == [update]
    record = store.orders.find_order(update.order_id)
    assert (record.state, record.digest, record.client_id) == (OrderState.STORED, update.digest, 1)
    other = make_update(update.order_id, payload=b"other bytes")
    assert record_arrival(store, run, other) == (OrderState.STORED, False)
    assert [stored.update for stored in store.orders.stored_updates(opened)] == [update]


def test_a_refused_update_is_kept_with_its_reason(store: Store) -> None:
    """REFUSED is final; metrics that JSON lacks are kept by name, and the history stays JSON."""
    run, opened = begin_round(store)
    bad = make_update(opened.orders[0].order_id, metrics={"loss": float("nan"), "accuracy": 0.5})
    state, _ = record_arrival(store, run, bad, OrderEvent.REFUSE, reason="loss is nan")
    assert state is OrderState.REFUSED
    assert store.orders.find_order(bad.order_id).reason == "loss is nan"
    assert store.orders.stored_updates(opened) == []
    (entry,) = read_history(store, run)
    (kept,) = json.loads(json.dumps(attempt_json(entry), allow_nan=False))["updates"]
    assert (kept["verdict"], kept["reason"]) == ("REFUSED", "loss is nan")
    assert kept["metrics"] == {"loss": "nan", "accuracy": 0.5}


def test_the_spool_keeps_what_a_round_needs_and_what_is_held(store: Store) -> None:
    """What goes on and what is held; of a round that is done what counted, if it is recent."""
    run, opened = begin_round(store, clients=(0, 1, 2, 3))
    good, bad, early, going_on = (order.order_id for order in opened.orders)
    kept = {order_id: make_update(order_id).digest for order_id in (good, bad)}
    record_arrival(store, run, make_update(good))
    record_arrival(store, run, make_update(bad), OrderEvent.REFUSE, reason="bad", kept_bytes=9)
    # Refused by its header: there are no bytes of it.
    record_arrival(store, run, make_update(early), OrderEvent.REFUSE, reason="bad")
    assert store.orders.updates_to_keep(run.run_id, since_round=2) == kept | {going_on: None}
    finish(store, run, opened)
    assert store.orders.updates_to_keep(run.run_id, since_round=1) == kept
    assert store.orders.updates_to_keep(run.run_id, since_round=2) == {bad: kept[bad]}
    (held,) = (update for update in store.quarantine.held_updates() if update.order_id == bad)
    store.quarantine.free_held(held, HeldState.DROPPED, make_event("quarantine-dropped"))
    assert store.orders.updates_to_keep(run.run_id, since_round=2) == {}


def test_an_update_that_comes_too_late_is_on_record_and_counts_for_nothing(store: Store) -> None:
    """After the close its order is LATE, whatever event comes with it."""
    run, opened = begin_round(store)
    record_arrival(store, run, make_update(opened.orders[0].order_id))
    store.rounds.close_round(opened, make_event("round-closed"))
    assert states_of(store, opened) == [OrderState.STORED, OrderState.LATE]
    late = make_update(opened.orders[1].order_id)
    store.database.take_recorded()
    assert record_arrival(store, run, late) == (OrderState.LATE, True)
    assert [event.kind for event in store.database.take_recorded()] == ["update-late"]
    assert record_arrival(store, run, late) == (OrderState.LATE, False)
    assert not store.database.take_recorded()
    assert [update.client_id for update in store.orders.stored_updates(opened)] == [0]
    assert store.orders.find_order(late.order_id).digest == late.digest


def test_an_abandoned_order_takes_no_update_any_more(store: Store) -> None:
    """Given up once; the second time it says no, and a stored update can't be given up so."""
    run, opened = begin_round(store)
    first, second = (order.order_id for order in opened.orders)
    assert store.orders.abandon_order(run.run_id, first, make_event("client-stalled"))
    assert not store.orders.abandon_order(run.run_id, first, make_event("client-stalled"))
    assert record_arrival(store, run, make_update(first))[0] is OrderState.ABANDONED
    record_arrival(store, run, make_update(second))
    assert not store.orders.abandon_order(run.run_id, second, make_event("client-stalled"))
    assert states_of(store, opened) == [OrderState.ABANDONED, OrderState.STORED]


def test_of_two_threads_that_record_one_order_exactly_one_wins(store: Store) -> None:
    """Real threads, one order, different bytes: one STORED with an event, the others nothing."""
    run, opened = begin_round(store, clients=range(20))
    for order in opened.orders:
        results: list[tuple[OrderState, bool]] = []
        barrier = threading.Barrier(3)

        def record(
            payload: bytes,
            order_id: str = order.order_id,
            recorded: list[tuple[OrderState, bool]] = results,
            gate: threading.Barrier = barrier,
        ) -> None:
            update = make_update(order_id, payload=payload)
            gate.wait()
            recorded.append(record_arrival(store, run, update))

        threads = [threading.Thread(target=record, args=(bytes([number]),)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [state for state, _ in results] == [OrderState.STORED] * 3
        assert sum(is_recorded for _, is_recorded in results) == 1
    assert len(store.orders.stored_updates(opened)) == 20


def test_an_update_and_the_close_never_both_have_their_way(store: Store) -> None:
    """Racing with the close, an update is STORED and counted, or LATE: never lost between."""
    run = store.runs.begin_run({})
    for number in range(1, 16):
        opened = make_round(run.run_id, round_number=number, clients=[0])
        store.rounds.open_round(opened, make_event("round-opened"))
        update = make_update(opened.orders[0].order_id)
        threads = [
            threading.Thread(target=record_arrival, args=(store, run, update)),
            threading.Thread(
                target=store.rounds.close_round, args=(opened, make_event("round-closed"))
            ),
        ]
        for thread in threads if number % 2 else reversed(threads):
            thread.start()
        for thread in threads:
            thread.join()
        state = store.orders.find_order(update.order_id).state
        assert state in (OrderState.STORED, OrderState.LATE)
        assert len(store.orders.stored_updates(opened)) == (state is OrderState.STORED)


def test_finishing_records_verdicts_ledger_and_the_next_round_at_once(store: Store) -> None:
    """DONE, COUNTED, a chained entry and the round after: all there, and the chain verifies."""
    run, first = begin_round(store)
    store_updates(store, run, first)
    second = make_round(run.run_id, round_number=2, base_digest="ee" * 32)
    finish(store, run, first, following=second)
    assert store.rounds.latest_attempt(run.run_id) == second
    assert states_of(store, first) == [OrderState.COUNTED] * 2
    assert store.orders.last_counted_orders(run.run_id) == {
        order.client_id: order.order_id for order in first.orders
    }
    record_arrival(store, run, make_update(second.orders[0].order_id))
    finish(store, run, second)
    with store.database.reading() as connection:
        rows = connection.exec_driver_sql(
            "SELECT round, entry, digest FROM ledger ORDER BY round"
        ).all()
    previous = ledger.GENESIS
    for row in rows:
        entry = json.loads(row.entry)
        assert entry["previous"] == previous
        assert ledger.entry_digest(row.entry.encode()) == row.digest
        previous = row.digest
    assert [row.round for row in rows] == [1, 2]
    first_entry, second_entry = (json.loads(row.entry) for row in rows)
    assert [update["client"] for update in first_entry["updates"]] == [0, 1]
    assert [update["client"] for update in second_entry["updates"]] == [0]
    assert first_entry["settings"] == run.settings
    latest = store.rounds.latest_attempt(run.run_id)
    assert latest is not None
    assert (latest.phase, latest.model_digest) == (Phase.DONE, "ee" * 32)


@pytest.mark.parametrize("where", ["ledger", "next round"])
def test_a_failure_amid_finishing_leaves_nothing_half_done(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Cut off before the ledger's entry or at the next round, the database is as it was."""
    run, opened = begin_round(store)
    store_updates(store, run, opened)
    store.rounds.close_round(opened, make_event("round-closed"))
    before = dump(path)

    def fail(*_: object, **__: object) -> bytes:
        raise RuntimeError("cut off")

    name = "ledger.entry_digest" if where == "ledger" else "rounds.insert_attempt"
    monkeypatch.setattr(f"fedserver.store.{name}", fail)
    following = make_round(run.run_id, round_number=2, base_digest="ee" * 32)
    with pytest.raises(RuntimeError, match="cut off"):
        store.rounds.finish_round(
            opened,
            model_digest="ee" * 32,
            next_round=following,
            events=[make_event("round-done"), make_event("round-opened", round_number=2)],
        )
    assert dump(path) == before
    monkeypatch.undo()
    store.rounds.finish_round(
        opened,
        model_digest="ee" * 32,
        next_round=following,
        events=[make_event("round-done"), make_event("round-opened", round_number=2)],
    )
    assert store.rounds.latest_attempt(run.run_id) == following


def test_a_failure_amid_recording_leaves_the_order_open(store: Store, path: Path) -> None:
    """If the evidence can't be written, neither is the order ended nor the update on record."""
    run, opened = begin_round(store)
    before = dump(path)
    arrival = Arrival(
        update=make_update(opened.orders[0].order_id),
        order_event=OrderEvent.REFUSE,
        refusal=Refusal(reason="bad", evidence={"kind": object()}),
    )
    with pytest.raises(StatementError, match="not JSON serializable"):
        store.orders.record_arrival(run.run_id, arrival)
    assert dump(path) == before


def test_no_phase_is_entered_twice_or_out_of_turn(store: Store, path: Path) -> None:
    """The phase in the database decides, not what the caller believes; nothing is changed."""
    _, opened = begin_round(store)
    with pytest.raises(ForbiddenTransition, match="COLLECTING can't finish"):
        store.rounds.finish_round(
            opened,
            model_digest="ee" * 32,
            next_round=None,
            events=[make_event("round-done")],
        )
    store.rounds.close_round(opened, make_event("round-closed"))
    before = dump(path)
    with pytest.raises(ForbiddenTransition, match="AGGREGATING can't close"):
        store.rounds.close_round(opened, make_event("round-closed"))
    assert dump(path) == before
    store.rounds.fail_round(opened, [make_event("round-failed")])
    with pytest.raises(ForbiddenTransition, match="FAILED can't fail"):
        store.rounds.fail_round(opened, [make_event("round-failed")])


def test_a_failed_round_ends_every_order(store: Store) -> None:
    """Open and stored orders are ABANDONED, refused orders stay; nothing of it is aggregated."""
    run, opened = begin_round(store, clients=(0, 1, 2))
    record_arrival(store, run, make_update(opened.orders[0].order_id))
    record_arrival(
        store, run, make_update(opened.orders[1].order_id), OrderEvent.REFUSE, reason="bad"
    )
    store.rounds.fail_round(opened, [make_event("round-failed")])
    assert states_of(store, opened) == [
        OrderState.ABANDONED,
        OrderState.REFUSED,
        OrderState.ABANDONED,
    ]
    assert store.orders.stored_updates(opened) == []
    again = make_round(run.run_id, attempt=2, clients=(0, 1, 2))
    store.rounds.open_round(again, make_event("round-opened", attempt=2))
    assert store.rounds.latest_attempt(run.run_id) == again


def test_an_unknown_order_is_not_found(store: Store) -> None:
    """Asking for it, ending it, abandoning it: NotFound with its name."""
    run, _ = begin_round(store)
    with pytest.raises(NotFound, match="no-such-order"):
        store.orders.find_order("no-such-order")
    with pytest.raises(NotFound, match="no-such-order"):
        record_arrival(store, run, make_update("no-such-order"))
    with pytest.raises(NotFound, match="no-such-order"):
        store.orders.abandon_order(run.run_id, "no-such-order", make_event())


def test_a_report_made_twice_is_one_event(store: Store) -> None:
    """The same report key is recorded once; without a key every event counts."""
    run, _ = begin_round(store)
    incident = Event(
        kind="non-finite-loss", occurred_at=1.0, round_number=1, attempt=1, is_incident=True
    )
    assert store.events.add_events(run.run_id, [incident], report_key="order#1")
    assert not store.events.add_events(run.run_id, [incident], report_key="order#1")
    assert store.events.add_events(run.run_id, [incident], report_key="order#2")
    assert store.events.add_events(run.run_id, [incident])
    assert store.events.add_events(run.run_id, [incident])
    assert len(read_history(store, run)[0].incidents) == 4


def test_an_incident_before_the_first_round_is_shown_with_its_first_attempt(
    store: Store,
) -> None:
    """And with no other attempt."""
    run, opened = begin_round(store)
    early = Event(kind="client-left", occurred_at=1.0, client_id=7, is_incident=True)
    store.events.add_events(run.run_id, [early])
    store.rounds.fail_round(opened, [make_event("round-failed")])
    store.rounds.open_round(make_round(run.run_id, attempt=2), make_event("round-opened"))
    incidents = [attempt.incidents for attempt in read_history(store, run)]
    assert [[event.client_id for event in of_attempt] for of_attempt in incidents] == [[7], []]


def test_sessions_are_remembered_until_they_are_replaced(store: Store) -> None:
    """Saved again, a session is brought up to date; removed, it is gone."""
    run = store.runs.begin_run({})
    store.runs.save_session(run.run_id, make_session(1, 2))
    newer = make_session(1, 2, instance_key="newer")
    store.runs.save_session(run.run_id, newer)
    assert store.runs.load_sessions(run.run_id) == [newer]
    assert store.runs.load_sessions("other-run") == []
    store.runs.remove_session(newer.session_id)
    assert store.runs.load_sessions(run.run_id) == []


def test_the_history_tells_everything_of_a_round(store: Store) -> None:
    """One object an attempt, JSON throughout, with the keys that programs rely on."""
    run, opened = begin_round(store)
    update = make_update(opened.orders[0].order_id, num_examples=7)
    record_arrival(store, run, update)
    incident = Event(
        kind="client-stalled",
        occurred_at=0.5,
        round_number=1,
        attempt=1,
        client_id=1,
        is_incident=True,
        fields={"idle_s": 3.5},
    )
    store.orders.abandon_order(run.run_id, opened.orders[1].order_id, incident)
    (collecting,) = read_history(store, run)
    assert (collecting.phase, collecting.finished_at) == ("COLLECTING", None)
    assert (collecting.model_digest, collecting.evaluation) == (None, None)
    assert store.rounds.unevaluated_rounds(run.run_id) == []
    store.rounds.record_evaluation(
        opened, ModelEvaluation(accuracy=0.1, loss=2.0), make_event("evaluated")
    )
    assert read_history(store, run)[0].evaluation is None, "there is no model to be so good"
    finish(store, run, opened)
    assert [attempt.round_number for attempt in store.rounds.unevaluated_rounds(run.run_id)] == [1]
    good = ModelEvaluation(accuracy=0.9, loss=0.3)
    store.rounds.record_evaluation(opened, good, make_event("evaluated"))
    assert store.rounds.unevaluated_rounds(run.run_id) == []
    store.runs.end_run(run.run_id, RunState.FINISHED, make_event("run-finished", round_number=None))
    (attempt,) = read_history(store, run)
    entry = json.loads(json.dumps(attempt_json(attempt), allow_nan=False))
    assert entry["round"] == 1
    assert entry["phase"] == "DONE"
    assert entry["cohort"] == [0, 1]
    (kept,) = entry["updates"]
    assert entry["started_at"] <= kept.pop("received_at") <= entry["closed_at"]
    assert kept.pop("received_after_s") >= 0
    assert kept.pop("answered_s") is None, "the order was never handed out"
    assert kept == {
        "order_id": update.order_id,
        "client": 0,
        "staleness": 0,
        "num_examples": 7,
        "digest": update.digest,
        "encoding": "state-dict",
        "size_bytes": len(b"payload"),
        "verdict": "COUNTED",
        "metrics": {"accuracy": 0.5, "loss": 1.25},
        "reason": None,
    }
    assert (entry["base_digest"], entry["model_digest"]) == (DIGEST, "ee" * 32)
    assert entry["evaluation"] == {"accuracy": 0.9, "loss": 0.3}
    assert entry["started_at"] <= entry["closed_at"] <= entry["finished_at"]
    assert entry["finished_at"].endswith("+00:00")
    assert entry["incidents"] == [
        {
            "kind": "client-stalled",
            "at": "1970-01-01T00:00:00.500000+00:00",
            "client": 1,
            "idle_s": 3.5,
        }
    ]
    latest = store.runs.latest_run()
    assert latest is not None
    assert latest.state is RunState.FINISHED
