"""What the store knows of clients' past, by which a cohort may be chosen."""

from pathlib import Path
from typing import Any

import pytest

from fedserver.phases import OrderEvent
from fedserver.records import Participation, Run
from fedserver.store import Store
from tests.factories import make_event, make_round, make_update, record_arrival


def play_round(
    store: Store, run: Run, number: int, metrics_of: dict[int, dict[str, float] | None]
) -> None:
    """Play a round to its end; a client with None doesn't answer."""
    opened = make_round(run.run_id, round_number=number, clients=list(metrics_of))
    store.rounds.open_round(opened, make_event(round_number=number))
    for order in opened.orders:
        metrics = metrics_of[order.client_id]
        if metrics is not None:
            payload = order.order_id.encode()
            record_arrival(
                store, run, make_update(order.order_id, payload=payload, metrics=metrics)
            )
    event = make_event(round_number=number)
    store.rounds.close_round(opened, event)
    store.rounds.finish_round(opened, model_digest="model", next_round=None, events=[event])


def test_the_past_is_how_often_a_client_was_asked_and_answered_and_its_last_loss(
    tmp_path: Path,
) -> None:
    """Over rounds, of this run alone; the global model's loss before that of the local epochs."""
    store = Store(tmp_path / "federation.sqlite")
    run = store.runs.begin_run({})
    assert store.orders.participation(run.run_id) == {}
    play_round(store, run, 1, {0: {"loss": 3.0}, 1: {"loss": 1.0, "global_loss": 2.5}, 2: None})
    play_round(store, run, 2, {0: {"loss": 0.5}, 2: None})
    assert store.orders.participation(run.run_id) == {
        0: Participation(num_asked=2, num_answered=2, loss=0.5),
        1: Participation(num_asked=1, num_answered=1, loss=2.5),
        2: Participation(num_asked=2, num_answered=0),
    }
    assert store.orders.participation(store.runs.begin_run({}).run_id) == {}
    store.close()


def test_the_round_that_goes_on_counts_and_what_was_refused_is_no_answer(tmp_path: Path) -> None:
    """The next cohort is chosen before its round is recorded as done; a NaN comes back as a NaN."""
    store = Store(tmp_path / "federation.sqlite")
    run = store.runs.begin_run({})
    opened = make_round(run.run_id, clients=(0, 1, 2))
    store.rounds.open_round(opened, make_event())
    first, second, _ = (order.order_id for order in opened.orders)
    record_arrival(store, run, make_update(first, metrics={"loss": float("nan")}))
    refused = make_update(second, payload=b"bad", metrics={"loss": 9.0})
    record_arrival(store, run, refused, OrderEvent.REFUSE, reason="its norm is absurd")
    nan: Any = pytest.approx(float("nan"), nan_ok=True)
    assert store.orders.participation(run.run_id) == {
        0: Participation(num_asked=1, num_answered=1, loss=nan),
        1: Participation(num_asked=1),
        2: Participation(num_asked=1),
    }
    store.close()
