"""How many clients a round asks, and how many clients and updates it needs.

These are the rules of a synchronous round. An asynchronous round needs a full buffer to close
(fedserver.rounds.asynchronous).
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Settings are validated with these rules.
    from fedserver.settings import ServerSettings


def clients_to_open(settings: "ServerSettings") -> int:
    """Return the number of clients that must be there before a round opens."""
    return max(settings.min_clients, settings.min_updates)


def clients_to_ask(settings: "ServerSettings") -> int:
    """Return the smallest number of clients to choose a cohort from.

    Suspended clients are called back when fewer are active.
    """
    return max(settings.min_clients, updates_needed(settings))


def cohort_size(settings: "ServerSettings") -> int:
    """Return the number of clients that a round asks; 0: all that are there."""
    return math.ceil(settings.clients_per_round * settings.over_select)


def updates_needed(settings: "ServerSettings") -> int:
    """Return the number of updates that a round needs, however many clients it asks."""
    if settings.min_updates:
        return settings.min_updates
    if settings.over_select > 1:
        return settings.clients_per_round
    return min(settings.min_clients, settings.clients_per_round or settings.min_clients)


def updates_to_close(settings: "ServerSettings", *, num_orders: int) -> int:
    """Return the number of updates that an attempt with so many orders needs to close."""
    if settings.require_all:
        return num_orders
    return updates_to_count(settings, num_orders=num_orders)


def updates_to_count(settings: "ServerSettings", *, num_orders: int) -> int:
    """Return the number of updates that must be left of such an attempt after screening."""
    return min(updates_needed(settings), num_orders)
