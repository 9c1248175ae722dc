"""Events: what is said of an update that comes in, and the line that the log has of an event."""

import pytest

from fedrounds.types import OrderEnd
from fedserver.events import event_line, event_of, update_event
from fedserver.phases import OrderEvent, OrderState
from fedserver.records import Arrival, Event, Refusal
from tests.factories import make_round, make_update


def update_event_of(
    state: OrderState, order_end: OrderEnd | None = None, *, refusal: Refusal | None = None
) -> Event:
    """Return the event of an update of client 3 whose order is in `state` afterwards."""
    update = make_update("order", num_examples=8, metrics={"loss": 0.5, "accuracy": 0.25})
    arrival = Arrival(update=update, order_event=OrderEvent.STORE, refusal=refusal)
    return update_event(
        arrival, state, order_end=order_end, client_id=3, round_key=(4, 2), occurred_at=1.5
    )


def test_a_stored_update_is_announced_with_its_numbers() -> None:
    """Metrics come in the order of their names, whatever the client sent first."""
    event = update_event_of(OrderState.STORED)
    assert (event.kind, event.is_incident, event.occurred_at) == ("update-stored", False, 1.5)
    assert (event.round_number, event.attempt, event.client_id) == (4, 2, 3)
    assert list(event.fields.items()) == [("num_examples", 8), ("accuracy", 0.25), ("loss", 0.5)]


def test_a_refused_update_is_an_incident_with_its_reason() -> None:
    """Nothing that the client has declared is repeated."""
    refusal = Refusal(reason="its loss is nan", evidence={})
    event = update_event_of(OrderState.REFUSED, OrderEnd.OTHER, refusal=refusal)
    assert (event.kind, event.is_incident) == ("update-refused", True)
    assert event.fields == {"reason": "its loss is nan"}


@pytest.mark.parametrize(
    ("state", "order_end"),
    [
        (OrderState.LATE, OrderEnd.ROUND_CLOSED),
        (OrderState.ABANDONED, OrderEnd.GIVEN_UP),
    ],
)
def test_an_update_after_its_orders_end_is_late(state: OrderState, order_end: OrderEnd) -> None:
    """The round closed without it, or its client was given up: an incident of that client."""
    event = update_event_of(state, order_end)
    assert (event.kind, event.is_incident) == ("update-late", True)
    assert event.fields == {"reason": None}


@pytest.mark.parametrize("order_end", [OrderEnd.ATTEMPT_FAILED, OrderEnd.TAKEN_BACK])
def test_an_update_for_an_attempt_that_ended_is_no_incident(order_end: OrderEnd) -> None:
    """Its client was in time."""
    event = update_event_of(OrderState.ABANDONED, order_end)
    assert (event.kind, event.is_incident) == ("update-unneeded", False)
    assert event.fields == {"reason": order_end}


def test_the_log_has_short_numbers_and_no_whole_diagnosis() -> None:
    """What is missing isn't mentioned, nor a first attempt."""
    event = event_of(
        "evaluated",
        make_round("run-1", round_number=3),
        loss=0.123456789,
        clients=[1, 2],
        reason="it is so",
        accuracy=None,
        diagnosis={"cause": "bad-data"},
    )
    assert event_line(event) == "evaluated round=3 loss=0.1235 clients=1,2 reason='it is so'"
    again = event_of("evaluated", make_round("run-1", round_number=3, attempt=2), client_id=0)
    assert event_line(again) == "evaluated round=3 attempt=2 client=0"
