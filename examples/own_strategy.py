"""Components of your own: a mean with other weights, and a robust rule.

    python -m fedserver --strategy examples.own_strategy:by_root
    python -m fedserver --strategy nnm+examples.own_strategy:midmean+fedadam

A component is a function whose parameters are given by name and have defaults; it returns one of
the kinds in fedrounds.strategies. What it computes must depend on nothing but its arguments, or
`verify` can't compute it again.
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
        middle: the share, above 0 and up to 1; at least one or two values, so that it is even.
    """
    if not 0 < middle <= 1:
        raise InvalidInput(f"middle is {middle:g}; it must be above 0 and at most 1")

    def reduce(ascending: Matrix) -> Matrix:
        num_updates = ascending.shape[1]
        num_cut = min(int((1 - middle) / 2 * num_updates), (num_updates - 1) // 2)
        mean: Matrix = ascending[:, num_cut : num_updates - num_cut].mean(axis=1, dtype="float64")
        return mean

    return RobustAggregator(reduce=reduce)
