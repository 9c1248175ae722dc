"""Aggregators that bear some bad updates: all count the same, whatever their clients claim.

`f` is the number of bad updates a rule is to bear, also called Byzantine. Distances are between
parameters (see fedrounds.strategies.geometry); float buffers are left to a coordinate-wise rule,
since what a distance doesn't see could hold anything.
"""

import math

import numpy as np

from fedrounds.errors import InvalidInput
from fedrounds.strategies.components import LinearMap, Matrix, RobustAggregator


def uniform() -> RobustAggregator:
    """Plain mean: every client counts the same, however much data it has. Bears no bad update."""

    def average(squared: Matrix, _: int) -> Matrix:
        num_updates = len(squared) - 1
        return _combination(np.full(num_updates, 1 / num_updates))

    return RobustAggregator(select=LinearMap(apply=average, needs_distances=False), reduce=_mean)


def median() -> RobustAggregator:
    """Coordinate-wise median (Yin et al. 2018, algorithm 1, option I).

    "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates". Of an even number of
    values it is the mean of the middle two.
    """
    return RobustAggregator(reduce=_median)


def trimmed_mean(*, trim: float = 0.2) -> RobustAggregator:
    """Coordinate-wise mean without the largest and smallest (Yin et al. 2018, option II).

    "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates".

    Args:
        trim: share of the values dropped at either end, rounded down.
    """
    if not 0 < trim < 0.5:
        raise InvalidInput(f"trim is {trim:g}; it must be above 0 and below 0.5")

    def reduce(ascending: Matrix) -> Matrix:
        num_updates = ascending.shape[1]
        # The product of 0.29 and 100 is a little below 29.
        num_cut = int(trim * num_updates + 1e-9)
        return _mean(ascending[:, num_cut : num_updates - num_cut])

    # With fewer nothing would be cut.
    return RobustAggregator(reduce=reduce, min_updates=math.ceil(1 / trim))


def krum(*, f: int = 1) -> RobustAggregator:
    """The update that is nearest to its nearest others (Blanchard et al. 2017).

    "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent": the least sum of
    squared distances to the n - f - 2 nearest others. Among equals the smallest client id wins.

    Args:
        f: bad updates to bear; it takes 2 f + 3 updates.
    """
    return multi_krum(f=f, keep=1)


def multi_krum(*, f: int = 1, keep: int = 0) -> RobustAggregator:
    """Mean of the best updates by Krum's score (Blanchard et al. 2017, its variant Multi-Krum).

    Args:
        f: bad updates to bear; it takes 2 f + 3 updates.
        keep: how many are averaged; 0: n - f, and never more.
    """
    _validate_f(f)
    if keep < 0:
        raise InvalidInput(f"keep is {keep}; it must be 0 (all but f) or a number of updates")

    def select(squared: Matrix, _: int) -> Matrix:
        scores = _krum_scores(squared[1:, 1:], f)
        best = np.argsort(scores, kind="stable")[: keep or len(scores) - f]
        chosen = np.zeros(len(scores))
        chosen[best] = 1 / len(best)
        return _combination(chosen)

    return RobustAggregator(
        select=LinearMap(apply=select), reduce=_median, min_updates=max(2 * f + 3, keep + f)
    )


def geometric_median(*, nu: float = 1e-6, iterations: int = 100) -> RobustAggregator:
    """Smoothed geometric median, by Weiszfeld's iterations (Pillutla et al. 2022, RFA).

    "Robust Aggregation for Federated Learning", algorithm 2, from the global model on. The paper
    weighs by num_examples; here all count the same, so that nobody can claim the majority.

    Args:
        nu: distances below it count as it.
        iterations: of Weiszfeld's algorithm; they cost next to nothing.
    """
    if not 0 < nu < math.inf or iterations < 1:
        raise InvalidInput(f"nu is {nu:g}, iterations {iterations}; both must be above 0")

    def select(squared: Matrix, _: int) -> Matrix:
        centre = np.eye(1, len(squared))[0]
        for _ in range(iterations):
            weights = 1 / np.maximum(nu, _distances_to(squared, centre))
            centre = _combination(weights / weights.sum())[0]
        return _rows(centre)

    return RobustAggregator(select=LinearMap(apply=select), reduce=_median)


def centered_clipping(*, radius: float = 0.0, iterations: int = 10) -> RobustAggregator:
    """Mean of the updates, each pulled within a radius of the centre (Karimireddy et al. 2021).

    "Learning from History for Byzantine Robust Optimization", algorithm 2. The centre begins at the
    global model, as that of a cohort without a history.

    Args:
        radius: the paper's tau; 0: the cohort's median distance from the global model, which is
            ours, since a number that fits one model fits no other.
        iterations: the paper's l.
    """
    if not 0 <= radius < math.inf or iterations < 1:
        raise InvalidInput(f"radius is {radius:g}, iterations {iterations}; neither may be below 0")

    def select(squared: Matrix, _: int) -> Matrix:
        reach = radius or float(np.median(np.sqrt(squared[0, 1:])))
        centre = np.eye(1, len(squared))[0]
        for _ in range(iterations):
            shares = within(reach, _distances_to(squared, centre)) / (len(squared) - 1)
            centre = centre * (1 - shares.sum())
            centre[1:] += shares
        return _rows(centre)

    return RobustAggregator(select=LinearMap(apply=select), reduce=_median)


def bulyan(*, f: int = 1) -> RobustAggregator:
    """Krum chooses n - 2 f updates; of each coordinate the middle is averaged (El Mhamdi 2018).

    "The Hidden Vulnerability of Distributed Learning in Byzantium". Krum's winner is taken out
    n - 2 f times; then come the coordinate's values nearest to its median, all but 2 f of them.

    Args:
        f: bad updates to bear; it takes 4 f + 3 updates.
    """
    _validate_f(f)

    def select(squared: Matrix, _: int) -> Matrix:
        remaining = list(range(len(squared) - 1))
        chosen = []
        for _ in range(len(remaining) - 2 * f):
            among = np.array(remaining) + 1
            winner = int(np.argmin(_krum_scores(squared[np.ix_(among, among)], f)))
            chosen.append(remaining.pop(winner))
        coefficients = np.zeros((len(chosen), len(squared)))
        coefficients[np.arange(len(chosen)), np.array(sorted(chosen)) + 1] = 1.0
        return coefficients

    def reduce(ascending: Matrix) -> Matrix:
        return _mean_around_median(ascending, ascending.shape[1] - 2 * f)

    return RobustAggregator(select=LinearMap(apply=select), reduce=reduce, min_updates=4 * f + 3)


def within(radius: float, distances: Matrix) -> Matrix:
    """Return by what each difference of this length is multiplied to be no longer than `radius`."""
    return radius / np.maximum(radius, distances) if radius else np.zeros_like(distances)


def _krum_scores(squared: Matrix, f: int) -> Matrix:
    """Return for each of n updates the sum of the n - f - 2 least squared distances to others."""
    num_updates = len(squared)
    others = squared[~np.eye(num_updates, dtype=bool)].reshape(num_updates, num_updates - 1)
    # Bulyan takes winners away until fewer are left than there are neighbours to count.
    nearest = np.sort(others, axis=1)[:, : max(1, num_updates - f - 2)]
    scores: Matrix = nearest.sum(axis=1)
    return scores


def _distances_to(squared: Matrix, centre: Matrix) -> Matrix:
    """Return how far each update is from a combination of base and updates, [num_updates]."""
    towards = np.einsum("ij,j->i", squared, centre)
    found = towards[1:] - np.einsum("i,i->", towards, centre) / 2
    distances: Matrix = np.sqrt(np.maximum(0.0, found))
    return distances


def _combination(of_updates: Matrix) -> Matrix:
    """Return the coefficients of one point that has nothing of the base, [1, num_updates + 1]."""
    return _rows(np.concatenate([[0.0], of_updates]))


def _rows(point: Matrix) -> Matrix:
    rows: Matrix = point.reshape(1, -1)
    return rows


def _mean(ascending: Matrix) -> Matrix:
    mean: Matrix = ascending.mean(axis=1, dtype=np.float64)
    return mean


def _median(ascending: Matrix) -> Matrix:
    num_updates = ascending.shape[1]
    low = ascending[:, (num_updates - 1) // 2].astype(np.float64)
    # Halved first, the sum of two huge values doesn't overflow.
    return low / 2 + ascending[:, num_updates // 2].astype(np.float64) / 2


def _mean_around_median(ascending: Matrix, num_kept: int) -> Matrix:
    """Return the mean of the `num_kept` values that are nearest to the median of each row.

    They are neighbours: of each run of that many, the one whose farther end is nearest. Of two that
    are as near the lower one.
    """
    middle = _median(ascending)[:, None]
    last = ascending.shape[1] - num_kept
    lower, upper = ascending[:, : last + 1], ascending[:, num_kept - 1 :]
    reach = np.maximum(middle - lower, upper - middle)
    begin = np.argmin(reach, axis=1)[:, None]
    return _mean(np.take_along_axis(ascending, begin + np.arange(num_kept), axis=1))


def _validate_f(f: int) -> None:
    if f < 0:
        raise InvalidInput(f"f is {f}; it must be a number of bad updates from 0 on")
