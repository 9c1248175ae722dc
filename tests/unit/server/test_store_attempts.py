"""What the store answers about attempts that failed, were screened or took time; damaged rows."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from fedrounds.errors import StorageDamaged
from fedrounds.types import IncidentKind, RunFailure
from fedserver.phases import OrderState
from fedserver.records import Adjustments, Event, Exclusion, Refusal
from fedserver.store import Store, read_history
from tests.factories import begin_round, make_event, make_round, store_updates

MODEL = "ee" * 32
LOWERED = Adjustments(lr_factor=0.5, num_lowered=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the path of a database."""
    return tmp_path / "federation.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Give an empty store."""
    opened = Store(path)
    yield opened
    opened.close()


def failure_event(reason: str, attempt: int = 1, **fields: str) -> Event:
    """Return the event of an attempt that fails."""
    event = make_event(IncidentKind.ROUND_FAILED, attempt=attempt)
    return replace(event, fields={"reason": reason, **fields})


def diagnosis_event(client_id: int, cause: str, *, attempt: int = 1) -> Event:
    """Return the event of a client's diagnosis."""
    event = make_event(IncidentKind.TRAINING_DIAGNOSED, attempt=attempt)
    return replace(event, client_id=client_id, fields={"cause": cause})


def test_the_last_failure_is_given_with_its_kind(store: Store) -> None:
    """No failure, an earlier version's, one of today's; the last counts."""
    run, opened = begin_round(store)
    assert store.events.last_failure(run.run_id) == ("", None)
    store.rounds.fail_round(opened, [failure_event("too few")])
    assert store.events.last_failure(run.run_id) == ("too few", None)
    again = make_round(run.run_id, attempt=2)
    store.rounds.open_round(again, make_event("round-opened", attempt=2))
    failure = failure_event("all refused", 2, failure=RunFailure.UPDATES_REFUSED)
    store.rounds.fail_round(again, [failure])
    assert store.events.last_failure(run.run_id) == ("all refused", RunFailure.UPDATES_REFUSED)
    assert store.events.last_failure("another run") == ("", None)


def test_answers_are_of_the_attempts_under_the_same_adjustments(store: Store) -> None:
    """Attempt 1 had the full rate; 2 and 3 the halved one, so that 3 also rests on 2's answers."""
    run, first = begin_round(store)
    store.events.add_events(run.run_id, [diagnosis_event(0, "learning-rate")])
    store.rounds.fail_round(first, [failure_event("diagnosed")], adjustments_after=LOWERED)
    assert store.events.answers(first) == ([(0, {"cause": "learning-rate"})], set())
    for number in (2, 3):
        attempt = replace(
            make_round(run.run_id, attempt=number, clients=(number, 7)), adjustments=LOWERED
        )
        store.rounds.open_round(attempt, make_event("round-opened", attempt=number))
        event = diagnosis_event(number, "bad-data", attempt=number)
        store.events.add_events(run.run_id, [event])
        if number == 2:
            store_updates(store, run, replace(attempt, orders=attempt.orders[1:]))
            store.rounds.fail_round(attempt, [failure_event("diagnosed", 2)])
    assert store.events.answers(attempt) == (
        [(2, {"cause": "bad-data"}), (3, {"cause": "bad-data"})],
        {7},
    )


def test_a_failed_attempt_may_blame_its_base_model(store: Store) -> None:
    """The last DONE round's model is bad once an attempt blames it, not before."""
    run, first = begin_round(store)
    store.rounds.close_round(first, make_event("round-closed"))
    second = make_round(run.run_id, round_number=2, base_digest=MODEL)
    events = [make_event("round-done"), make_event("round-opened", round_number=2)]
    store.rounds.finish_round(first, model_digest=MODEL, next_round=second, events=events)
    store.rounds.fail_round(second, [make_event("round-failed", round_number=2)])
    assert store.rounds.regressed_round(run.run_id) is None
    third = make_round(run.run_id, round_number=2, attempt=2, base_digest=MODEL)
    store.rounds.open_round(third, make_event("round-opened", round_number=2, attempt=2))
    event = make_event("round-failed", round_number=2, attempt=2)
    store.rounds.fail_round(third, [event], is_base_blamed=True)
    bad = store.rounds.regressed_round(run.run_id)
    assert bad is not None
    assert (bad.round_number, bad.model_digest) == (1, MODEL)


def test_the_time_of_a_run_is_that_of_its_ended_attempts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run's clock: 3 s and 5 s of two attempts; the third goes on, pauses don't count."""
    now_s = 1000.0
    monkeypatch.setattr("fedserver.store.run_clock.since_boot_s", lambda: now_s)
    run, attempt = begin_round(store)
    assert store.rounds.time_spent_s(run.run_id) == 0
    for number, took_s in ((1, 3.0), (2, 5.0)):
        now_s += took_s
        store.rounds.fail_round(attempt, [failure_event("too few", number)])
        now_s += 100
        attempt = make_round(run.run_id, attempt=number + 1)
        store.rounds.open_round(attempt, make_event("round-opened", attempt=number + 1))
    assert store.rounds.time_spent_s(run.run_id) == 8
    assert store.rounds.time_spent_s("another run") == 0


def test_an_excluded_update_is_held_and_its_client_suspended(store: Store) -> None:
    """All of it in the transaction that ends the attempt; the other update is abandoned with it."""
    run, opened = begin_round(store)
    store_updates(store, run, opened)
    exclusion = Exclusion(
        order_id=opened.orders[0].order_id,
        client_id=0,
        refusal=Refusal(reason="its norm is 80", evidence={"kind": "norm-band", "norm": 80.0}),
        kept_bytes=12,
        event=replace(make_event("update-excluded"), client_id=0),
    )
    store.database.take_recorded()
    store.rounds.fail_round(opened, [failure_event("excluded")], exclusions=[exclusion])
    records = [store.orders.find_order(order.order_id) for order in opened.orders]
    assert [record.state for record in records] == [OrderState.EXCLUDED, OrderState.ABANDONED]
    assert [record.reason for record in records] == ["its norm is 80", None]
    (held,) = store.quarantine.held_updates(run.run_id)
    assert (held.refusal, held.kept_bytes) == (exclusion.refusal, 12)
    suspension = store.quarantine.suspensions(run.run_id)[0]
    assert suspension.strikes == 0
    excluded, failed = store.database.take_recorded()
    assert excluded.fields == {"suspended_until": suspension.suspended_until}
    assert failed.kind == IncidentKind.ROUND_FAILED


@pytest.mark.parametrize("column", ["adjustments", "client_evaluation"])
def test_a_row_with_a_field_that_nobody_writes_is_damage(
    store: Store, path: Path, column: str
) -> None:
    """It is said so with the path, not with a traceback."""
    run, _ = begin_round(store)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"UPDATE rounds SET {column} = '{{\"unknown\": 1}}'")
        connection.commit()
    with pytest.raises(StorageDamaged, match=r"can't be read .* restore it from a copy"):
        read_history(store, run)


def test_a_text_that_is_no_unicode_is_damage(store: Store, path: Path) -> None:
    """A flipped bit in a text, read by the server; a look at it from outside shows the rest."""
    run, _ = begin_round(store)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE orders SET client_id = 0, state = CAST(x'ff' AS TEXT)")
        connection.commit()
    with pytest.raises(StorageDamaged):
        store.rounds.latest_attempt(run.run_id)
