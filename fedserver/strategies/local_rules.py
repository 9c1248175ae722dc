"""What clients do otherwise than plain training; how they do it, fedclient.local_rules says."""

import math

from fedserver.strategies.rows import Local
from shared.errors import InvalidInput
from shared.types import LocalRule


def fedprox(*, mu: float = 0.01) -> Local:
    """Clients stay near the global model (Li et al. 2020, algorithm 2).

    "Federated Optimization in Heterogeneous Networks": a client minimises its loss plus
    mu / 2 * |w - w_global|^2, and may stop early (--work-deadline, --stragglers). The paper weighs
    all updates of a cohort the same: uniform+fedprox with --cohort data-size.

    Args:
        mu: how much it pulls; 0 is fedavg. The paper tries 0.001, 0.01, 0.1 and 1.
    """
    _examine_weight("mu", mu, may_be_zero=True)
    return Local(rule=LocalRule(name="fedprox", parameters={"mu": mu}))


def _examine_weight(name: str, value: float, *, may_be_zero: bool = False) -> None:
    if not 0 <= value < math.inf or (value == 0 and not may_be_zero):
        raise InvalidInput(
            f"{name} is {value:g}; it must be " + ("0 or more" if may_be_zero else "above 0")
        )
