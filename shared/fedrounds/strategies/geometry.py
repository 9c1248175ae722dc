"""Squared distances between a cohort's updates, in one pass over their files.

Only parameters count: BatchNorm's running variances have a scale of their own and would drown them
out. In float32 the usual formula (norms minus twice the inner products) picks the wrong client at
the size of a small CNN; here a squared distance is within 1e-9 (relative) of the exact one of what
the files hold, as long as its square neither overflows nor underflows.
"""

from collections.abc import Callable
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt
import torch

from fedrounds.strategies.blocks import (
    Block,
    Cohort,
    RowReader,
    blocks_of,
    compute_blocks,
    elements_per_row,
)
from fedrounds.strategies.components import Matrix
from fedrounds.types import EntryKind

_COLUMNS = 1024
_TILE = 128
_BITS = 20
# Of a squared distance within a block of columns.
_TOLERANCE = 2.0**-31


def squared_distances(cohort: Cohort) -> Matrix:
    """Return the squared L2 distances of base and updates, [num_updates + 1, num_updates + 1].

    The base comes first. The same bits for any number of threads.
    """
    files = [cohort.base, *cohort.updates]
    total = np.zeros((len(files), len(files)))
    return _add_blocks(total, cohort, lambda: BlockDistances(RowReader(files)))


def squared_norms(cohort: Cohort) -> Matrix:
    """Return the squared L2 norms of the updates' deltas, [num_updates].

    In a fraction of the time that all distances take. The same bits for any number of threads.
    """
    files = [cohort.base, *cohort.updates]

    def begin() -> Callable[[Block], Matrix]:
        rows = RowReader(files)

        def compute(block: Block) -> Matrix:
            values = rows.read(block)
            found = np.zeros(len(values) - 1)
            for begin in range(0, block.count, _COLUMNS):
                points = values[:, begin : begin + _COLUMNS].double()
                found += _squared_norms(points[1:] - points[0])
            return found

        return compute

    return _add_blocks(np.zeros(len(cohort.updates)), cohort, begin)


def _add_blocks(
    total: Matrix, cohort: Cohort, begin: Callable[[], Callable[[Block], Matrix]]
) -> Matrix:
    """Add what is computed of each block of parameters to `total`, in order, and return it."""
    longest = elements_per_row(len(cohort.updates) + 1)
    blocks = (
        block
        for block in blocks_of(cohort.base.layout, max_elements=longest)
        if cohort.kinds[block.name] is EntryKind.PARAMETER
    )
    for partial in compute_blocks(blocks, begin, at_a_time=1):
        total += partial
    return total


class BlockDistances:
    """One thread's share of the pass."""

    def __init__(self, rows: RowReader) -> None:
        self._rows = rows

    def __call__(self, block: Block) -> Matrix:
        """Return the squared distances within a block."""
        values = self._rows.read(block)
        found = np.zeros((len(values), len(values)))
        for begin in range(0, block.count, _COLUMNS):
            _add_distances(found, values[:, begin : begin + _COLUMNS])
        return found


def _add_distances(found: Matrix, points: torch.Tensor) -> None:
    """Add the squared distances of `points`, [num_points, at most _COLUMNS], of any float dtype.

    They are norms minus twice the inner products, of deltas from the points' mean: what all updates
    have in common must not drown out how they differ. The inner products are sums of exact ones
    (Ozaki et al. 2012, "Error-free transformations of matrix multiplication"): each row is split
    into two slices of 20 bits below its largest element, so that a product of slices summed over
    2^10 columns fits in float64's 53 bits. Then it doesn't matter in which order a matrix product
    adds, which differs between numbers of threads. What the slices leave out is below 2^-41 of a
    row's largest element; the products of two lower slices are left out too. A bound on both, and
    on the rounding of the norms, is computed for each pair, and pairs for which it could matter are
    computed from their differences.

    Pairs are taken by tiles: nothing but `found` grows with the square of the cohort, and two
    float64 for every number in `points` are all that grows with it otherwise.
    """
    deltas = points.to(torch.float64, copy=True)
    # Of NumPy, whose sums are the same for any number of threads.
    deltas -= torch.from_numpy(deltas.numpy().mean(axis=0))
    norms = _squared_norms(deltas)
    # What the slices leave out of a row, times another row, is at most 2^-40 of the one's largest
    # element times the other's sum of magnitudes.
    largest = deltas.abs().amax(dim=1).numpy()
    sums = deltas.abs().numpy().sum(axis=1)
    high, low = _slices(deltas)
    low_norms = _squared_norms(low)
    tiles = [slice(begin, begin + _TILE) for begin in range(0, len(points), _TILE)]
    for one, other in combinations_with_replacement(tiles, 2):
        mixed = high[one] @ low[other].T
        mixed += low[one] @ high[other].T
        products = high[one] @ high[other].T
        products += mixed
        squared = norms[one, None] + norms[None, other] - 2 * products.numpy()
        left_out = 2 * np.sqrt(np.outer(low_norms[one], low_norms[other]))
        beyond = np.outer(largest[one], sums[other]) + np.outer(sums[one], largest[other])
        left_out += 2.0**-40 * beyond
        left_out += 2.0**-42 * (norms[one, None] + norms[None, other])
        inexact = left_out > _TOLERANCE * squared
        if one is other:
            squared, inexact = np.triu(squared, k=1), np.triu(inexact, k=1)
        _put_differences(squared, inexact, points[one], points[other])
        found[one, other] += squared
        found[other, one] += squared.T


def _squared_norms(rows: torch.Tensor) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.einsum("ij,ij->i", rows.numpy(), rows.numpy())
    return found


def _slices(deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the _BITS bits below each row's largest element, and the _BITS bits below those.

    The latter are in the memory of `deltas`.
    """
    largest = torch.maximum(deltas.amax(dim=1), -deltas.amin(dim=1))
    exponents = torch.frexp(largest).exponent.double()[:, None]
    # Added and taken away again, it rounds to multiples of 2^(exponent - _BITS).
    rounder = 1.5 * torch.exp2(exponents + (52 - _BITS))
    high = deltas + rounder
    high -= rounder
    low = deltas.sub_(high)
    rounder *= 2.0**-_BITS
    low += rounder
    low -= rounder
    return high, low


def _put_differences(
    squared: Matrix, where: npt.NDArray[np.bool_], points: torch.Tensor, others: torch.Tensor
) -> None:
    """Put squared distances that are computed from differences into `squared`, in some places."""
    first, second = np.nonzero(where)
    for begin in range(0, len(first), _TILE):
        one, other = first[begin : begin + _TILE], second[begin : begin + _TILE]
        differences = (points[one].double() - others[other].double()).numpy()
        squared[one, other] = np.einsum("pk,pk->p", differences, differences)


def distances_between(squared: Matrix, coefficients: Matrix) -> Matrix:
    """Return the squared distances of the base and of points that are combinations of others.

    `squared` is [m + 1, m + 1], `coefficients` [k, m + 1] with rows that sum to 1; the result is
    [k + 1, k + 1], the base first. With d the difference of two rows it is -d' squared d / 2.
    """
    base = np.eye(1, len(squared))
    points = np.vstack([base, coefficients])
    # einsum and not @: a loop of ours alone, the same for any number of threads.
    products = np.einsum("ik,jk->ij", np.einsum("ij,jk->ik", points, squared), points)
    own = products.diagonal()
    found: Matrix = np.maximum(0.0, (products + products.T - own[:, None] - own[None, :]) / 2)
    close = found < 1e-6 * squared.max(initial=0.0)
    for one, other in zip(*np.nonzero(np.triu(close, k=1)), strict=True):
        difference = points[one] - points[other]
        exact = -0.5 * np.einsum("j,jk,k->", difference, squared, difference)
        found[one, other] = found[other, one] = max(0.0, float(exact))
    np.fill_diagonal(found, 0.0)
    return found
