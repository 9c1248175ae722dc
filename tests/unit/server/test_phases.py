"""The tables of phases: what isn't in them can't happen."""

from itertools import product

import pytest

from fedserver.phases import (
    ORDER_TABLE,
    ROUND_TABLE,
    ForbiddenTransition,
    OrderEvent,
    OrderState,
    Phase,
    RoundEvent,
    due_event,
    due_of_buffer,
    next_order_state,
    next_phase,
    shortfall,
)

# Written down again, so that a change of the tables is a change of two files.
PHASES = {
    ("COLLECTING", "close"): "AGGREGATING",
    ("COLLECTING", "fail"): "FAILED",
    ("AGGREGATING", "finish"): "DONE",
    ("AGGREGATING", "fail"): "FAILED",
    ("COLLECTING", "abandon"): "ABANDONED",
    ("AGGREGATING", "abandon"): "ABANDONED",
    ("DONE", "roll-back"): "ROLLED_BACK",
}
STATES = {
    ("OPEN", "store"): "STORED",
    ("OPEN", "refuse"): "REFUSED",
    ("OPEN", "miss"): "LATE",
    ("OPEN", "abandon"): "ABANDONED",
    ("STORED", "count"): "COUNTED",
    ("STORED", "exclude"): "EXCLUDED",
    ("STORED", "abandon"): "ABANDONED",
}


@pytest.mark.parametrize(("phase", "event"), list(product(Phase, RoundEvent)))
def test_a_round_moves_as_the_table_says_or_not_at_all(phase: Phase, event: RoundEvent) -> None:
    """Every pair of phase and event: the next phase, or an error that names both."""
    if (phase.value, event.value) in PHASES:
        assert next_phase(phase, event).value == PHASES[phase.value, event.value]
    else:
        with pytest.raises(ForbiddenTransition, match=f"in phase {phase} can't {event}"):
            next_phase(phase, event)


@pytest.mark.parametrize(("state", "event"), list(product(OrderState, OrderEvent)))
def test_an_order_moves_as_the_table_says_or_not_at_all(
    state: OrderState, event: OrderEvent
) -> None:
    """Every pair of state and event: the next state, or an error that names both."""
    if (state.value, event.value) in STATES:
        assert next_order_state(state, event).value == STATES[state.value, event.value]
    else:
        with pytest.raises(ForbiddenTransition, match=f"in state {state} can't {event}"):
            next_order_state(state, event)


def test_what_has_ended_has_no_way_out_and_everything_can_end() -> None:
    """FAILED and its like, and the five ends of an order, are final; all others lead to an end."""
    final = {Phase.FAILED, Phase.ABANDONED, Phase.ROLLED_BACK}
    assert set(Phase) - {phase for phase, _ in ROUND_TABLE} == final
    assert {state for state, _ in ORDER_TABLE} == {OrderState.OPEN, OrderState.STORED}
    assert set(ORDER_TABLE.values()) == set(OrderState) - {OrderState.OPEN}
    assert set(ROUND_TABLE.values()) == set(Phase) - {Phase.COLLECTING}


O, S, L, R, A = (  # noqa: E741
    OrderState.OPEN,
    OrderState.STORED,
    OrderState.LATE,
    OrderState.REFUSED,
    OrderState.ABANDONED,
)


@pytest.mark.parametrize(
    ("states", "min_updates", "is_overdue", "due"),
    [
        ([O, O], 1, False, None),  # nobody has answered
        ([S, O], 1, False, None),  # enough to close, but another may still come
        ([S, S], 2, False, RoundEvent.CLOSE),  # nobody is left to wait for
        ([S, R], 1, False, RoundEvent.CLOSE),
        ([S, O], 1, True, RoundEvent.CLOSE),  # the deadline cuts the slow one off
        ([S, O], 2, True, RoundEvent.FAIL),  # the deadline came before the minimum
        ([O, O], 1, True, RoundEvent.FAIL),
        ([S, R], 2, False, RoundEvent.FAIL),  # the minimum is out of reach
        ([S, A, O], 3, False, RoundEvent.FAIL),  # at once: waiting for the open one can't help
        ([S, A, O], 2, False, None),  # the open one decides
        ([R, A, L], 1, False, RoundEvent.FAIL),
        ([], 1, False, RoundEvent.FAIL),
    ],
)
def test_a_collecting_round_closes_fails_or_waits(
    states: list[OrderState], min_updates: int, is_overdue: bool, due: RoundEvent | None
) -> None:
    """It closes when no order is open or time is up, with enough; it fails when it can't."""
    event = due_event(states, min_updates=min_updates, closes_early=False, is_overdue=is_overdue)
    assert event is due


@pytest.mark.parametrize("num_states", range(4))
def test_no_round_waits_when_waiting_cannot_change_the_outcome(num_states: int) -> None:
    """For every cohort of up to three: wait only while an order is open and time is left."""
    for states in product(OrderState, repeat=num_states):
        for min_updates, closes_early, is_overdue in product(
            range(1, 5), (False, True), (False, True)
        ):
            due = due_event(
                states, min_updates=min_updates, closes_early=closes_early, is_overdue=is_overdue
            )
            stored, still_open = states.count(S), states.count(O)
            if due is None:
                assert still_open
                assert not is_overdue
                assert stored + still_open >= min_updates
                assert not (closes_early and stored >= min_updates)
            else:
                assert (due is RoundEvent.CLOSE) == (stored >= min_updates)
                assert due is not RoundEvent.FAIL or is_overdue or stored + still_open < min_updates


def test_a_buffer_closes_when_it_is_full_and_fails_when_nobody_can_fill_it() -> None:
    """Open orders and other ends don't count; a full one closes whatever else is true."""

    def due(states: list[OrderState], *, can_go_on: bool) -> RoundEvent | None:
        return due_of_buffer(states, buffer_size=2, can_go_on=can_go_on)

    assert due([S, O, R], can_go_on=True) is None
    assert due([S, O, R], can_go_on=False) is RoundEvent.FAIL
    assert due([S, S, O], can_go_on=True) is RoundEvent.CLOSE
    assert due([S, S, S], can_go_on=False) is RoundEvent.CLOSE


@pytest.mark.parametrize(
    ("states", "needed", "words"),
    [
        ([S, R, A], 2, "1 of 2 updates are there, and none can still come"),
        ([S, O, A], 3, "1 of 3 updates are there, and only 1 can still come"),
        ([S, O], 2, "only 1 of 2 updates were there at its deadline"),
    ],
)
def test_why_a_round_cannot_close(states: list[OrderState], needed: int, words: str) -> None:
    """Its minimum is out of reach, or its time was up."""
    assert shortfall(states, needed) == words
