"""What the server makes of a cohort's updates, one row a strategy."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedserver.strategies.blocks import Aggregator
from fedserver.strategies.means import weighted_mean
from shared.errors import InvalidInput


@dataclass(frozen=True)
class Strategy:
    """How updates become the next global model."""

    aggregator: Aggregator


STRATEGIES: Mapping[str, Strategy] = {
    # McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    # Data", algorithm 1.
    "fedavg": Strategy(aggregator=weighted_mean),
}


def find_strategy(name: str) -> Strategy:
    """Return the strategy of that name.

    Raises:
        InvalidInput: there is none; the message lists those there are.
    """
    try:
        return STRATEGIES[name]
    except KeyError:
        raise InvalidInput(
            f"there is no strategy {name!r}; choose one of {', '.join(STRATEGIES)}"
        ) from None
