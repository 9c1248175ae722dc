"""Who sits out, for how long, and that nobody waits for rounds that can't come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedserver.records import Suspension
from fedserver.suspension import (
    MAX_SPAN,
    after_exclusion,
    after_strike,
    eligible_clients,
)


def make_suspension(client_id: int, suspended_until: int) -> Suspension:
    """Return a suspension with one strike."""
    return Suspension(client_id=client_id, strikes=1, suspended_until=suspended_until, reason="r")


@pytest.mark.parametrize(
    ("strikes_before", "rounds_sat_out"),
    [(0, 1), (1, 2), (2, 4), (5, 32), (6, 64), (500, MAX_SPAN)],
)
def test_each_strike_costs_twice_as_many_rounds(strikes_before: int, rounds_sat_out: int) -> None:
    """Struck in round 10 it sits out from 11 on, and is back by itself in the round after."""
    before = (
        Suspension(client_id=3, strikes=strikes_before, suspended_until=0, reason="old")
        if strikes_before
        else None
    )
    after = after_strike(before, client_id=3, round_number=10, reason="stalled")
    assert after.strikes == strikes_before + 1
    assert after.reason == "stalled"
    sat_out = [
        number
        for number in range(11, 200)
        if not eligible_clients({3}, {3: after}, round_number=number, num_needed=0)
    ]
    assert sat_out == list(range(11, 11 + rounds_sat_out))


def test_an_exclusion_costs_one_round_however_often() -> None:
    """It is no strike: a client that is excluded each time sits out every other round."""
    suspension: Suspension | None = None
    asked = []
    for number in range(10, 20):
        known = {} if suspension is None else {3: suspension}
        if eligible_clients({3}, known, round_number=number, num_needed=0):
            asked.append(number)
            suspension = after_exclusion(
                suspension, client_id=3, round_number=number, reason="excluded"
            )
    assert asked == list(range(10, 20, 2))
    stalled = after_strike(suspension, client_id=3, round_number=20, reason="stalled")
    assert (stalled.strikes, stalled.suspended_until) == (1, 22)


def test_a_client_struck_in_an_attempt_isnt_asked_in_the_next() -> None:
    """A round that failed is tried again with others."""
    after = after_strike(None, client_id=1, round_number=4, reason="refused")
    assert eligible_clients({0, 1, 2}, {1: after}, round_number=4, num_needed=2) == {0, 2}


@given(
    ends=st.dictionaries(st.integers(0, 30), st.integers(0, 20)),
    others=st.sets(st.integers(0, 30)),
    round_number=st.integers(1, 20),
    num_needed=st.integers(0, 30),
)
def test_suspended_clients_are_called_back_only_as_far_as_needed(
    ends: dict[int, int], others: set[int], round_number: int, num_needed: int
) -> None:
    """All active clients may be asked; suspended clients make up what is missing, nearest first."""
    candidates = set(ends) | others
    suspensions = {
        client_id: make_suspension(client_id, until) for client_id, until in ends.items()
    }
    eligible = eligible_clients(
        candidates, suspensions, round_number=round_number, num_needed=num_needed
    )
    active = {client_id for client_id in candidates if ends.get(client_id, 0) <= round_number}
    assert active <= eligible <= candidates
    assert len(eligible) == max(len(active), min(num_needed, len(candidates)))
    recalled, left = eligible - active, candidates - eligible
    assert all((ends[a], a) < (ends[b], b) for a in recalled for b in left)
