"""A round that is rolled back: one transaction, a fact in the ledger, and where a run goes on."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedrounds.goals import LOWEST_LOSS, Goal
from fedserver.phases import ForbiddenTransition, OrderState, Phase
from fedserver.records import Adjustments, Attempt, ModelEvaluation, Run
from fedserver.store import Store
from fedserver.verification.chain import (
    chain_findings,
    finished_rounds,
    row_findings,
    whole_entries,
)
from tests.factories import begin_round, make_event, make_round, store_updates

HIGHEST_ACCURACY = Goal("accuracy", is_highest=True)
FIRST, BAD, GOOD, LAST = ("11" * 32, "22" * 32, "33" * 32, "44" * 32)
LOWERED = Adjustments(lr_factor=0.5, num_lowered=1)


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


def finish(store: Store, run: Run, opened: Attempt, model: str, following: Attempt | None) -> None:
    """Let everybody deliver to a round, and finish it."""
    store_updates(store, run, opened)
    store.rounds.close_round(opened, make_event("round-closed", round_number=opened.round_number))
    events = [make_event("round-done", round_number=opened.round_number)]
    if following is not None:
        events.append(make_event("round-opened", round_number=following.round_number))
    store.rounds.finish_round(opened, model_digest=model, next_round=following, events=events)


def latest(store: Store, run: Run) -> Attempt:
    """Return the attempt from which a run goes on."""
    attempt = store.rounds.latest_attempt(run.run_id)
    assert attempt is not None
    return attempt


def state_of(attempt: Attempt) -> tuple[int, int, Phase]:
    """Return where an attempt is and how it stands."""
    return attempt.round_number, attempt.attempt, attempt.phase


def findings(store: Store, run: Run) -> list[str]:
    """Return what is wrong with a run's ledger and rows."""
    ledger = store.ledger.read_ledger(run.run_id)
    return [*chain_findings(ledger), *row_findings(ledger)]


def two_rounds(store: Store) -> tuple[Run, Attempt, Attempt, Attempt]:
    """Begin a run with two rounds done, the third open; returns the run and the rounds."""
    run, first = begin_round(store)
    second = make_round(run.run_id, round_number=2, base_digest=FIRST)
    third = make_round(run.run_id, round_number=3, base_digest=BAD)
    finish(store, run, first, FIRST, second)
    finish(store, run, second, BAD, third)
    return run, first, second, third


def roll_back(store: Store, run: Run, abandoned: Attempt | None) -> None:
    """Take the model of the second round back."""
    bad = store.rounds.regressed_round(run.run_id) or latest(store, run)
    store.rounds.roll_back(
        bad,
        [make_event("model-rolled-back", round_number=2)],
        adjustments_after=LOWERED,
        abandoned=abandoned,
    )


def alarm(store: Store, second: Attempt) -> None:
    """Record that the second round's model is bad."""
    evaluation = ModelEvaluation(accuracy=0.1, loss=None)
    event = make_event("evaluation-collapsed", round_number=2)
    store.rounds.record_evaluation(second, evaluation, event, regression="non-finite-loss")


def repeat(store: Store, run: Run) -> tuple[Attempt, Attempt]:
    """Do the second round again, open the third again, and do it; returns these attempts."""
    again = make_round(run.run_id, round_number=2, attempt=2, base_digest=FIRST)
    store.rounds.open_round(again, make_event("round-opened", round_number=2, attempt=2))
    number = 1 + len(store.rounds.phases_of(run.run_id, 3))
    third = make_round(run.run_id, round_number=3, attempt=number, base_digest=GOOD)
    finish(store, run, again, GOOD, third)
    finish(store, run, third, LAST, None)
    return again, third


def test_a_rollback_ends_both_attempts_at_once(store: Store) -> None:
    """The bad round's and that which goes on with its model; nothing of them is in force."""
    run, first, second, third = two_rounds(store)
    assert store.rounds.regressed_round(run.run_id) is None
    alarm(store, second)
    bad = store.rounds.regressed_round(run.run_id)
    assert bad is not None
    assert state_of(bad) == (2, 1, Phase.DONE)
    roll_back(store, run, third)
    after = latest(store, run)
    assert state_of(after) == (2, 1, Phase.ROLLED_BACK)
    assert (after.base_digest, after.adjustments_after) == (FIRST, LOWERED)
    assert store.rounds.phases_of(run.run_id, 3) == [Phase.ABANDONED]
    assert store.orders.find_order(third.orders[0].order_id).state is OrderState.ABANDONED
    assert store.orders.find_order(second.orders[0].order_id).state is OrderState.COUNTED
    assert store.orders.last_counted_orders(run.run_id) == {
        order.client_id: order.order_id for order in first.orders
    }
    assert store.rounds.good_evaluations(run.run_id) == {}
    assert store.rounds.regressed_round(run.run_id) is None
    with pytest.raises(ForbiddenTransition):
        store.rounds.roll_back(
            bad, [make_event("again")], adjustments_after=LOWERED, abandoned=None
        )


def test_of_evaluations_no_more_is_read_than_is_compared(store: Store) -> None:
    """Loss and accuracy, without the confusion; the best model is the earliest of equals."""
    run, first, second, third = two_rounds(store)
    assert store.rounds.best_model(run.run_id, HIGHEST_ACCURACY) is None
    finish(store, run, third, LAST, None)
    for done, accuracy in ((first, 0.5), (second, 0.75), (third, 0.75)):
        measured = ModelEvaluation(
            accuracy=accuracy,
            loss=None if done is first else 0.3,
            confusion=[[1, 0], [0, 1]],
        )
        event = make_event("evaluated", round_number=done.round_number)
        store.rounds.record_evaluation(done, measured, event)
    assert store.rounds.good_evaluations(run.run_id) == {
        1: ModelEvaluation(accuracy=0.5, loss=None),
        2: ModelEvaluation(accuracy=0.75, loss=0.3),
        3: ModelEvaluation(accuracy=0.75, loss=0.3),
    }
    assert store.rounds.best_model(run.run_id, HIGHEST_ACCURACY) == (2, BAD, 0.75)
    assert store.rounds.best_model(run.run_id, LOWEST_LOSS) == (2, BAD, 0.3)
    assert store.rounds.best_model(run.run_id, Goal("f1", is_highest=True)) is None


def test_a_run_goes_on_from_the_repetition(store: Store) -> None:
    """Whatever attempts at the round after it were left behind, also failed attempts."""
    run, _, second, third = two_rounds(store)
    store.rounds.fail_round(third, [make_event("round-failed", round_number=3)])
    alarm(store, second)
    roll_back(store, run, None)
    assert state_of(latest(store, run)) == (2, 1, Phase.ROLLED_BACK)
    again = make_round(run.run_id, round_number=2, attempt=2, base_digest=FIRST)
    store.rounds.open_round(again, make_event("round-opened", round_number=2, attempt=2))
    assert state_of(latest(store, run)) == (2, 2, Phase.COLLECTING)
    finish(store, run, again, GOOD, None)
    assert state_of(latest(store, run)) == (2, 2, Phase.DONE)
    assert store.rounds.phases_of(run.run_id, 3) == [Phase.FAILED]
    assert findings(store, run) == []


def test_the_ledger_holds_a_rollback_as_a_fact(store: Store) -> None:
    """Whole at every moment: with the bad model, rolled back, and done again."""
    run, _, second, third = two_rounds(store)
    assert findings(store, run) == []
    alarm(store, second)
    roll_back(store, run, third)
    assert findings(store, run) == []
    assert finished_rounds(store.ledger.read_ledger(run.run_id)) == [1]
    repeat(store, run)
    assert findings(store, run) == []
    ledger = store.ledger.read_ledger(run.run_id)
    assert [(row.round_number, row.attempt, row.kind) for row in ledger.entries] == [
        (1, 1, "finish"),
        (2, 1, "finish"),
        (2, 1, "roll-back"),
        (2, 2, "finish"),
        (3, 2, "finish"),
    ]
    assert finished_rounds(ledger) == [1, 2, 3]
    models = {number: entry.model_digest for number, entry in whole_entries(ledger).items()}
    assert models == {1: FIRST, 2: GOOD, 3: LAST}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "UPDATE rounds SET phase = 'DONE' WHERE round = 2 AND attempt = 1",
            "round 2: attempt 1 was rolled back, in the table of rounds it is DONE",
        ),
        (
            "UPDATE rounds SET phase = 'ROLLED_BACK' WHERE round = 3 AND attempt = 2",
            "round 3: that it was rolled back is missing from the ledger",
        ),
        (
            "DELETE FROM ledger WHERE kind = 'roll-back'",
            "round 2: that it was rolled back is missing from the ledger",
        ),
        (
            "DELETE FROM ledger WHERE round = 2 AND attempt = 1 AND kind = 'finish'",
            "round 2: its entry is missing from the ledger",
        ),
        (
            "UPDATE ledger SET entry = replace(entry, 'rolled_back', 'rolled_over')"
            " WHERE kind = 'roll-back'",
            "round 2: its entry in the ledger isn't what was written",
        ),
        (
            f"UPDATE rounds SET base_digest = '{BAD}' WHERE round = 3 AND attempt = 2",
            "round 3: its base model is",
        ),
        (
            f"UPDATE rounds SET base_digest = '{LAST}' WHERE round = 3 AND attempt = 1",
            "round 3: attempt 1 began with model 444444444444",
        ),
        (
            "UPDATE rounds SET adjustments = '{\"lr_factor\": 0.25}'"
            " WHERE round = 2 AND attempt = 2",
            "round 2: what was changed for it is {'lr_factor': 0.25}",
        ),
        (
            "UPDATE rounds SET model_digest = 'x' WHERE round = 2 AND attempt = 1",
            "round 2: its model is x in the table",
        ),
    ],
)
def test_what_was_changed_about_a_rollback_is_found(
    store: Store, path: Path, change: str, words: str
) -> None:
    """In the ledger, in the table of rounds, or in one of them alone."""
    run, _, second, third = two_rounds(store)
    alarm(store, second)
    roll_back(store, run, third)
    repeat(store, run)
    connection = sqlite3.connect(path)
    assert connection.execute(change).rowcount == 1
    connection.commit()
    connection.close()
    texts = findings(store, run)
    assert any(words in text for text in texts), texts


def test_attempts_at_the_first_round_share_their_model_unless_it_was_drawn_anew(
    store: Store,
) -> None:
    """Another base without a redraw on record is found."""
    run, first = begin_round(store)
    store.rounds.fail_round(first, [make_event("round-failed")])
    redrawn = make_round(run.run_id, attempt=2, base_digest=FIRST)
    store.rounds.open_round(redrawn, make_event("round-opened", attempt=2))
    (finding,) = findings(store, run)
    assert "attempt 2 began with model 111111111111" in finding


def test_the_best_model_that_stays_was_not_taken_back(store: Store) -> None:
    """However well the model that was taken back had scored before its alarm."""
    run, _, second, third = two_rounds(store)
    event = make_event("evaluated", round_number=2)
    store.rounds.record_evaluation(
        second, ModelEvaluation(accuracy=0.95, loss=9.0), event, regression="loss-explosion"
    )
    roll_back(store, run, third)
    again, newest = repeat(store, run)
    for attempt, accuracy in ((again, 0.94), (newest, 0.90)):
        event = make_event("evaluated", round_number=attempt.round_number, attempt=attempt.attempt)
        store.rounds.record_evaluation(attempt, ModelEvaluation(accuracy=accuracy, loss=0.1), event)
    everything = [FIRST, BAD, GOOD, LAST]
    let_go = store.rounds.models_let_go(
        run.run_id, everything, since_round=4, goal=HIGHEST_ACCURACY
    )
    assert GOOD not in let_go
    assert LAST in let_go
    let_go = store.rounds.models_let_go(
        run.run_id, everything, since_round=4, goal=Goal("accuracy", is_highest=False)
    )
    assert GOOD in let_go
    assert LAST not in let_go
