"""Robust aggregators: they tolerate some bad updates and give every client the same weight.

`f` is the number of bad (Byzantine) updates to tolerate. Distances are between parameters only (see
fedrounds.strategies.geometry). Float buffers go to a coordinate-wise aggregator, since a distance
doesn't cover them and they could hold anything.
"""

import math

import numpy as np

from fedrounds.errors import InvalidInput
from fedrounds.strategies.components import LinearMap, Matrix, RobustAggregator


def uniform() -> RobustAggregator:
    """Plain mean: every client counts the same, whatever it reports. Tolerates no bad update."""

    def average(squared: Matrix, _: int) -> Matrix:
        num_updates = len(squared) - 1
        return _combination(np.full(num_updates, 1 / num_updates))

    return RobustAggregator(select=LinearMap(apply=average, needs_distances=False), reduce=_mean)


def median() -> RobustAggregator:
    """Coordinate-wise median (Yin et al. 2018, algorithm 1, option I).

    "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates". For an even number
    of values it is the mean of the two in the middle.
    """
    return RobustAggregator(reduce=_median)


def trimmed_mean(*, trim: float = 0.2) -> RobustAggregator:
    """Coordinate-wise mean without the largest and smallest (Yin et al. 2018, option II).

    "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates".

    Args:
        trim: share of the values to drop at each end, rounded down.
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
    squared distances to the n - f - 2 nearest others. On a tie the smallest client id wins.

    Args:
        f: bad updates to tolerate; needs 2 f + 3 updates.
    """
    return multi_krum(f=f, keep=1)


def multi_krum(*, f: int = 1, keep: int = 0) -> RobustAggregator:
    """Mean of the best updates by Krum's score (Blanchard et al. 2017, its variant Multi-Krum).

    Args:
        f: bad updates to tolerate; needs 2 f + 3 updates.
        keep: number of updates to average; 0: n - f, which is also the maximum.
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

    "Robust Aggregation for Federated Learning", algorithm 2, starting at the global model. The
    paper weights by num_examples; here all count the same, so that no client can claim a majority.

    Args:
        nu: smallest distance; shorter distances count as nu.
        iterations: number of Weiszfeld iterations; they cost next to nothing.
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
    global model, as for a cohort without history.

    Args:
        radius: the paper's tau; 0: the cohort's median distance from the global model (ours, not
            the paper's, since a number that fits one model fits no other).
        iterations: the paper's l, number of times that the centre moves.
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
    """Krum selects n - 2 f updates; the middle of each coordinate is averaged (El Mhamdi 2018).

    "The Hidden Vulnerability of Distributed Learning in Byzantium". Krum selects and removes a
    winner n - 2 f times. For each coordinate, the mean is of the values nearest to the median, all
    but 2 f of them.

    Args:
        f: bad updates to tolerate; needs 4 f + 3 updates.
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
    """Return the factor that clips each distance to `radius`."""
    return radius / np.maximum(radius, distances) if radius else np.zeros_like(distances)


def _krum_scores(squared: Matrix, f: int) -> Matrix:
    """Return each update's sum of the n - f - 2 smallest squared distances to others, [n]."""
    num_updates = len(squared)
    others = squared[~np.eye(num_updates, dtype=bool)].reshape(num_updates, num_updates - 1)
    # Bulyan removes winners until fewer updates are left than there are neighbours to count.
    nearest = np.sort(others, axis=1)[:, : max(1, num_updates - f - 2)]
    scores: Matrix = nearest.sum(axis=1)
    return scores


def _distances_to(squared: Matrix, centre: Matrix) -> Matrix:
    """Return each update's distance from a combination of base and updates, [num_updates]."""
    towards = np.einsum("ij,j->i", squared, centre)
    squares = towards[1:] - np.einsum("i,i->", towards, centre) / 2
    distances: Matrix = np.sqrt(np.maximum(0.0, squares))
    return distances


def _combination(of_updates: Matrix) -> Matrix:
    """Return the coefficients of a point that has no part of the base, [1, num_updates + 1]."""
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
    # Halve first: the sum of two huge values could overflow.
    return low / 2 + ascending[:, num_updates // 2].astype(np.float64) / 2


def _mean_around_median(ascending: Matrix, num_kept: int) -> Matrix:
    """Return the mean of the `num_kept` values nearest to the median of each row.

    These are neighbours in the sorted row: the run of that length whose farther end is nearest to
    the median. On a tie the lower run wins.
    """
    middle = _median(ascending)[:, None]
    last = ascending.shape[1] - num_kept
    lower, upper = ascending[:, : last + 1], ascending[:, num_kept - 1 :]
    reach = np.maximum(middle - lower, upper - middle)
    begin = np.argmin(reach, axis=1)[:, None]
    return _mean(np.take_along_axis(ascending, begin + np.arange(num_kept), axis=1))


def _validate_f(f: int) -> None:
    if f < 0:
        raise InvalidInput(f"f is {f}; it must be 0 or more bad updates")
