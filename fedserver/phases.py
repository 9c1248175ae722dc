"""The life of a round and of an order: everything that changes a phase is in this file.

    round:  COLLECTING -close-> AGGREGATING -finish-> DONE -roll back-> ROLLED_BACK
                |                    |
                +------- fail -------+-------------> FAILED
                |                    |
                +------ abandon -----+-------------> ABANDONED

FAILED is tried again. ROLLED_BACK: its model is bad, so the model before it is the global model
again, and the round is tried again; the attempt at the round after, which began with the bad
model, is ABANDONED. Every new try is the next attempt.

    order:  OPEN -store-> STORED -count-> COUNTED
             |               +-exclude-> EXCLUDED                 (screened out at the close)
             +-refuse-> REFUSED                                   (the update is bad in itself)
             +-miss---> LATE                                      (the round closed without it)
             +-abandon> ABANDONED   (given up by the client, stalled, lost, or with its round)

An order ends exactly once, and the event that ends it is applied in the transaction that also
records what it rests on.

In an asynchronous run a round is one fill of the buffer. Orders that are open when it closes are
carried over: their updates come into the round that collects when they arrive. They are LATE when
they have become too stale, or the run ends without them.
"""

from collections.abc import Collection, Mapping
from enum import StrEnum

from fedrounds.errors import FederationError


class Phase(StrEnum):
    """Where an attempt at a round stands."""

    COLLECTING = "COLLECTING"
    AGGREGATING = "AGGREGATING"
    DONE = "DONE"
    FAILED = "FAILED"
    ROLLED_BACK = "ROLLED_BACK"
    ABANDONED = "ABANDONED"


class RoundEvent(StrEnum):
    """An event that changes the phase of an attempt."""

    CLOSE = "close"
    FINISH = "finish"
    FAIL = "fail"
    ROLL_BACK = "roll-back"
    ABANDON = "abandon"


class OrderState(StrEnum):
    """Where an order stands; all but OPEN and STORED are final."""

    OPEN = "OPEN"
    STORED = "STORED"
    COUNTED = "COUNTED"
    EXCLUDED = "EXCLUDED"
    REFUSED = "REFUSED"
    LATE = "LATE"
    ABANDONED = "ABANDONED"


class OrderEvent(StrEnum):
    """An event that changes the state of an order."""

    STORE = "store"
    COUNT = "count"
    EXCLUDE = "exclude"
    REFUSE = "refuse"
    MISS = "miss"
    ABANDON = "abandon"


ROUND_TABLE: Mapping[tuple[Phase, RoundEvent], Phase] = {
    (Phase.COLLECTING, RoundEvent.CLOSE): Phase.AGGREGATING,
    (Phase.COLLECTING, RoundEvent.FAIL): Phase.FAILED,
    (Phase.AGGREGATING, RoundEvent.FINISH): Phase.DONE,
    (Phase.AGGREGATING, RoundEvent.FAIL): Phase.FAILED,
    (Phase.COLLECTING, RoundEvent.ABANDON): Phase.ABANDONED,
    (Phase.AGGREGATING, RoundEvent.ABANDON): Phase.ABANDONED,
    (Phase.DONE, RoundEvent.ROLL_BACK): Phase.ROLLED_BACK,
}

ORDER_TABLE: Mapping[tuple[OrderState, OrderEvent], OrderState] = {
    (OrderState.OPEN, OrderEvent.STORE): OrderState.STORED,
    (OrderState.OPEN, OrderEvent.REFUSE): OrderState.REFUSED,
    (OrderState.OPEN, OrderEvent.MISS): OrderState.LATE,
    (OrderState.OPEN, OrderEvent.ABANDON): OrderState.ABANDONED,
    (OrderState.STORED, OrderEvent.COUNT): OrderState.COUNTED,
    (OrderState.STORED, OrderEvent.EXCLUDE): OrderState.EXCLUDED,
    (OrderState.STORED, OrderEvent.ABANDON): OrderState.ABANDONED,
}


class ForbiddenTransition(FederationError):
    """An event can't be applied in the phase; nothing was changed."""


def next_phase(phase: Phase, event: RoundEvent) -> Phase:
    """Return the phase that follows.

    Raises:
        ForbiddenTransition: the event can't be applied in this phase.
    """
    try:
        return ROUND_TABLE[phase, event]
    except KeyError:
        raise ForbiddenTransition(f"a round in phase {phase} can't {event}") from None


def next_order_state(state: OrderState, event: OrderEvent) -> OrderState:
    """Return the state that follows.

    Raises:
        ForbiddenTransition: the order has ended, or the event can't be applied in its state.
    """
    try:
        return ORDER_TABLE[state, event]
    except KeyError:
        raise ForbiddenTransition(f"an order in state {state} can't {event}") from None


def due_event(
    states: Collection[OrderState], *, min_updates: int, closes_early: bool, is_overdue: bool
) -> RoundEvent | None:
    """Return the event that is due for a round that collects, by the states of its orders.

    It closes when no order is open any more, or its deadline is past, with at least `min_updates`
    stored; with `closes_early` as soon as they are stored. It fails when that minimum can't be
    reached. None: go on waiting.
    """
    num_open = sum(state is OrderState.OPEN for state in states)
    num_stored = sum(state is OrderState.STORED for state in states)
    if num_stored + num_open < min_updates:
        return RoundEvent.FAIL
    has_enough = num_stored >= min_updates
    if num_open and not is_overdue and not (closes_early and has_enough):
        return None
    return RoundEvent.CLOSE if has_enough else RoundEvent.FAIL


def due_of_buffer(
    states: Collection[OrderState], *, buffer_size: int, can_go_on: bool
) -> RoundEvent | None:
    """Return the event that is due for an asynchronous round that collects.

    `states` are of the orders at work and of those that ended in it. It closes when its buffer is
    full, and fails when it isn't and can't go on. None: go on waiting.
    """
    if sum(state is OrderState.STORED for state in states) >= buffer_size:
        return RoundEvent.CLOSE
    return None if can_go_on else RoundEvent.FAIL


def shortfall(states: Collection[OrderState], needed: int) -> str:
    """Return in words why a round whose orders have these states can't close."""
    num_open = sum(state is OrderState.OPEN for state in states)
    num_stored = sum(state is OrderState.STORED for state in states)
    if num_stored + num_open < needed:
        still = f"only {num_open}" if num_open else "none"
        return f"{num_stored} of {needed} updates are there, and {still} can still come"
    return f"only {num_stored} of {needed} updates were there at its deadline"
