"""What happened, told to whoever listens: the log, a terminal, a dashboard.

An event is in the store before it is published here; listeners change nothing.
"""

import logging
import time
from collections.abc import Callable

from fedserver.records import Event, Round

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
        """Tell every listener."""
        for listener in self._listeners:
            listener(event)


def event_of(
    kind: str,
    of: Round | None = None,
    *,
    client_id: int | None = None,
    is_incident: bool = False,
    **fields: object,
) -> Event:
    """Return an event that happens now, in a round if one is given."""
    return Event(
        kind=str(kind),
        at=time.time(),
        round_number=None if of is None else of.round_number,
        attempt=None if of is None else of.attempt,
        client_id=client_id,
        is_incident=is_incident,
        fields=fields,
    )


def event_line(event: Event) -> str:
    """Return an event as key=value words; a whole diagnosis isn't one, its verdict is."""
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
