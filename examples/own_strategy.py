"""Components of your own for a strategy: a mean with other weights, and a robust aggregator.

    python -m fedserver --strategy examples.own_strategy:by_root
    python -m fedserver --strategy nnm+examples.own_strategy:midmean+fedadam

A component is a function with keyword parameters that have defaults. It returns one of the classes
in fedrounds.strategies. Its results must depend on its arguments alone, or `verify` can't compute
them again.
"""

import math

from fedrounds.errors import InvalidInput
from fedrounds.strategies import (
    Cohort,
    Matrix,
    RobustAggregator,
    WeightedAggregator,
    Weights,
    mean_by,
)


def by_root(*, power: float = 0.5) -> WeightedAggregator:
    """Mean weighted by num_examples^power: between the uniform mean (0) and FedAvg (1).

    Args:
        power: from 0 to 1.
    """
    if not 0 <= power <= 1:
        raise InvalidInput(f"power is {power:g}; it must be from 0 to 1")

    def weigh(cohort: Cohort) -> Weights:
        weights = [update.num_examples**power for update in cohort.updates]
        return Weights(weights, math.fsum(weights))

    return WeightedAggregator(aggregator=mean_by(weigh))


def midmean(*, middle: float = 0.5) -> RobustAggregator:
    """Mean of the middle share of each coordinate's values.

    Args:
        middle: the share to average, above 0 and up to 1; at least the one or two middle values.
    """
    if not 0 < middle <= 1:
        raise InvalidInput(f"middle is {middle:g}; it must be above 0 and at most 1")

    def reduce(ascending: Matrix) -> Matrix:
        num_updates = ascending.shape[1]
        num_cut = min(int((1 - middle) / 2 * num_updates), (num_updates - 1) // 2)
        mean: Matrix = ascending[:, num_cut : num_updates - num_cut].mean(axis=1, dtype="float64")
        return mean

    return RobustAggregator(reduce=reduce)
