"""Steps before a robust aggregator that make updates more alike, for clients whose data differ."""

import math
import random

import numpy as np

from fedrounds.errors import InvalidInput
from fedrounds.strategies.components import LinearMap, Matrix, PreAggregator
from fedrounds.strategies.robust import within


def clip(*, radius: float = 0.0) -> PreAggregator:
    """Shorten every delta to a maximal norm (Sun et al. 2019, norm thresholding).

    "Can You Really Backdoor Federated Learning?"

    Args:
        radius: the largest norm; 0: the cohort's median norm (ours, not the paper's, since a number
            that fits one model fits no other).
    """
    if not 0 <= radius < math.inf:
        raise InvalidInput(f"radius is {radius:g}; it must be 0 (the median norm) or a norm")

    def apply(squared: Matrix, _: int) -> Matrix:
        norms = np.sqrt(squared[0, 1:])
        shares = within(radius or float(np.median(norms)), norms)
        return np.column_stack([1 - shares, np.diag(shares)])

    return PreAggregator(
        linear_map=LinearMap(apply=apply), min_updates=lambda needed: needed, bounds_updates=True
    )


def nnm(*, f: int = 1) -> PreAggregator:
    """Replace every update by the mean of its n - f nearest and itself (Allouah et al. 2023).

    "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", algorithm 2. The n -
    f include the update itself. On a tie the smaller client id wins.

    Args:
        f: bad updates to tolerate; needs 2 f + 1 updates.
    """
    if f < 0:
        raise InvalidInput(f"f is {f}; it must be 0 or more bad updates")

    def apply(squared: Matrix, _: int) -> Matrix:
        among = squared[1:, 1:].copy()
        num_kept = len(among) - f
        # An update comes before others that are equal to it.
        np.fill_diagonal(among, -1.0)
        nearest = np.argsort(among, axis=1, kind="stable")[:, :num_kept]
        coefficients = np.zeros((len(among), len(squared)))
        np.put_along_axis(coefficients, nearest + 1, 1 / num_kept, axis=1)
        return coefficients

    return PreAggregator(
        linear_map=LinearMap(apply=apply), min_updates=lambda needed: max(needed, 2 * f + 1)
    )


def bucketing(*, size: int = 2) -> PreAggregator:
    """Deal updates at random into buckets, and go on with their means (Karimireddy et al. 2022).

    "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", algorithm 1. f bad updates
    spoil up to f buckets. The draw depends on the run's seed and the attempt at the round.

    Args:
        size: the paper's s, number of updates in a bucket; the last bucket may have fewer.
    """
    if size < 1:
        raise InvalidInput(f"size is {size}; a bucket must have at least 1 update")

    def apply(squared: Matrix, seed: int) -> Matrix:
        num_updates = len(squared) - 1
        order = random.Random(seed).sample(range(num_updates), num_updates)
        buckets = [order[begin : begin + size] for begin in range(0, num_updates, size)]
        coefficients = np.zeros((len(buckets), len(squared)))
        for row, bucket in zip(coefficients, buckets, strict=True):
            row[np.array(bucket) + 1] = 1 / len(bucket)
        return coefficients

    return PreAggregator(
        linear_map=LinearMap(apply=apply, needs_distances=False),
        min_updates=lambda needed: size * (needed - 1) + 1,
    )
