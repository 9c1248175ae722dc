"""Events, and the bus that passes them to listeners: the log, a terminal, a dashboard.

An event is in the store before it is published here; listeners change nothing.
"""

import logging
import time
from collections.abc import Callable

from fedrounds.types import IncidentKind, OrderEnd
from fedserver.phases import OrderState
from fedserver.records import Arrival, Attempt, Event

logger = logging.getLogger(__name__)

Listener = Callable[[Event], None]


class EventBus:
    """Passes each event to every listener, in order, on the caller's thread."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` with every event from now on."""
        self._listeners.append(listener)

    def publish(self, event: Event) -> None:
        """Pass an event to every listener."""
        for listener in self._listeners:
            listener(event)


def event_of(
    kind: str,
    of: Attempt | None = None,
    *,
    client_id: int | None = None,
    is_incident: bool = False,
    **fields: object,
) -> Event:
    """Return an event that happens now, in the round `of` if that is given."""
    return Event(
        kind=str(kind),
        occurred_at=time.time(),
        round_number=None if of is None else of.round_number,
        attempt=None if of is None else of.attempt,
        client_id=client_id,
        is_incident=is_incident,
        fields=fields,
    )


_NOT_NEEDED = (OrderEnd.ATTEMPT_FAILED, OrderEnd.TAKEN_BACK, OrderEnd.RUN_STOPPED)


def update_event(
    arrival: Arrival,
    state: OrderState,
    *,
    order_end: OrderEnd | None,
    client_id: int,
    round_key: tuple[int, int],
    occurred_at: float,
) -> Event:
    """Return the event of an update that has come in, in the round and attempt it came into.

    `state` is the state of its order afterwards, `order_end` how the order ended if no update of it
    counts.
    """
    fields: dict[str, object] = {}
    if order_end in _NOT_NEEDED:
        # The attempt ended first. The client was in time: no incident.
        kind, fields = "update-unneeded", {"reason": order_end}
    elif state is OrderState.STORED:
        kind, fields = "update-stored", {"num_examples": arrival.update.num_examples}
        fields |= dict(sorted(arrival.update.metrics.items()))
    else:
        is_refused = state is OrderState.REFUSED
        kind = IncidentKind.UPDATE_REFUSED if is_refused else IncidentKind.UPDATE_LATE
        fields = {"reason": None if arrival.refusal is None else arrival.refusal.reason}
    return Event(
        kind=str(kind),
        occurred_at=occurred_at,
        round_number=round_key[0],
        attempt=round_key[1],
        client_id=client_id,
        is_incident=kind in (IncidentKind.UPDATE_REFUSED, IncidentKind.UPDATE_LATE),
        fields=fields,
    )


def event_line(event: Event) -> str:
    """Return an event as key=value words; of a diagnosis only its verdict."""
    words = [event.kind]
    for key, value in (
        ("round", event.round_number),
        ("attempt", event.attempt if event.attempt != 1 else None),
        ("client", event.client_id),
        *event.fields.items(),
    ):
        if value is not None and key != "diagnosis":
            words.append(f"{key}={_short(value)}")
    return " ".join(words)


def log_event(event: Event) -> None:
    """Write one line to the log; incidents as warnings."""
    logger.log(logging.WARNING if event.is_incident else logging.INFO, "%s", event_line(event))


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return repr(text) if " " in text else text
