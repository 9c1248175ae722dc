"""How many clients a round asks, and how many clients and updates it needs."""

import pytest

from fedserver.quorum import (
    clients_to_ask,
    clients_to_open,
    cohort_size,
    updates_needed,
    updates_to_close,
    updates_to_count,
)
from fedserver.settings import ServerSettings


@pytest.mark.parametrize(
    ("settings", "num_asked", "num_needed"),
    [
        ({}, 0, 2),
        ({"min_clients": 5}, 0, 5),
        ({"min_clients": 5, "min_updates": 3}, 0, 3),
        ({"clients_per_round": 10}, 10, 2),
        ({"min_clients": 1000, "clients_per_round": 100}, 100, 100),
        ({"clients_per_round": 10, "over_select": 1.3}, 13, 10),
        ({"clients_per_round": 10, "over_select": 1.25, "min_updates": 8}, 13, 8),
    ],
    ids=str,
)
def test_how_many_are_asked_and_how_many_must_answer(
    settings: dict[str, object], num_asked: int, num_needed: int
) -> None:
    """Over-selection asks more, rounded up, and is content with the round's own number."""
    made = ServerSettings(**settings)  # type: ignore[arg-type]
    assert (cohort_size(made), updates_needed(made)) == (num_asked, num_needed)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"min_clients": 2}, 2),
        ({"min_clients": 1, "min_updates": 2}, 2),
        ({"min_clients": 1, "min_updates": 9}, 3),
        ({"min_clients": 1, "min_updates": 2, "require_all": True}, 3),
    ],
)
def test_how_many_updates_close_a_round_of_three(settings: dict[str, object], needed: int) -> None:
    """As --min-updates or --min-clients says, of those that were asked; or all of them."""
    made = ServerSettings(**settings)  # type: ignore[arg-type]
    assert updates_to_close(made, num_orders=3) == needed


def test_a_round_that_waits_for_everybody_counts_without_the_excluded() -> None:
    """--require-all decides how many come in; how many must be left is the round's own number."""
    made = ServerSettings(min_clients=2, require_all=True)
    assert (updates_to_close(made, num_orders=3), updates_to_count(made, num_orders=3)) == (3, 2)


@pytest.mark.parametrize(
    ("settings", "to_open", "to_ask"),
    [
        ({"min_clients": 3}, 3, 3),
        ({"min_clients": 2, "min_updates": 4}, 4, 4),
        ({"min_clients": 4, "min_updates": 1}, 4, 4),
        # A cohort larger than the number of clients that must be there is chosen from more.
        ({"min_clients": 2, "clients_per_round": 5, "over_select": 1.2}, 2, 5),
    ],
    ids=str,
)
def test_how_many_clients_a_round_opens_with(
    settings: dict[str, object], to_open: int, to_ask: int
) -> None:
    """It opens with --min-clients, and calls suspended clients back to have enough to ask."""
    made = ServerSettings(**settings)  # type: ignore[arg-type]
    assert (clients_to_open(made), clients_to_ask(made)) == (to_open, to_ask)
