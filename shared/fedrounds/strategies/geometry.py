"""Squared distances between a cohort's updates, in one pass over their files.

Only parameters count: BatchNorm's running variances have another scale and would dominate. In
float32 the usual formula (norms minus twice the inner products) selects the wrong client already
for a small CNN. Here the relative error of a squared distance is below 1e-9, as long as its square
neither overflows nor underflows.
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
# Relative tolerance of a squared distance within a block of columns.
_TOLERANCE = 2.0**-31


def squared_distances(cohort: Cohort) -> Matrix:
    """Return the squared L2 distances of base and updates, [num_updates + 1, num_updates + 1].

    The base comes first. The bits are the same for any number of threads.
    """
    files = [cohort.base, *cohort.updates]
    total = np.zeros((len(files), len(files)))
    return _add_blocks(total, cohort, lambda: BlockDistances(RowReader(files)))


def squared_norms(cohort: Cohort) -> Matrix:
    """Return the squared L2 norms of the updates' deltas, [num_updates].

    This takes a fraction of the time of all distances. The bits are the same for any number of
    threads.
    """
    files = [cohort.base, *cohort.updates]

    def begin() -> Callable[[Block], Matrix]:
        rows = RowReader(files)

        def compute(block: Block) -> Matrix:
            values = rows.read(block)
            norms = np.zeros(len(values) - 1)
            for begin in range(0, block.count, _COLUMNS):
                points = values[:, begin : begin + _COLUMNS].double()
                norms += _squared_norms(points[1:] - points[0])
            return norms

        return compute

    return _add_blocks(np.zeros(len(cohort.updates)), cohort, begin)


def _add_blocks(
    total: Matrix, cohort: Cohort, begin: Callable[[], Callable[[Block], Matrix]]
) -> Matrix:
    """Add the result for each block of parameters to `total`, in order, and return it."""
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
    """Computes the squared distances within blocks, in one thread."""

    def __init__(self, rows: RowReader) -> None:
        self._rows = rows

    def __call__(self, block: Block) -> Matrix:
        """Return the squared distances within a block."""
        values = self._rows.read(block)
        distances = np.zeros((len(values), len(values)))
        for begin in range(0, block.count, _COLUMNS):
            _add_distances(distances, values[:, begin : begin + _COLUMNS])
        return distances


def _add_distances(total: Matrix, points: torch.Tensor) -> None:
    """Add the squared distances of `points`, [num_points, at most _COLUMNS], to `total`.

    They are norms minus twice the inner products, of deltas from the points' mean, so that what all
    updates have in common doesn't hide their differences. The inner products are sums of exact
    products (Ozaki et al. 2012, "Error-free transformations of matrix multiplication"): each row is
    split into two slices of 20 bits below its largest element, so that a product of slices summed
    over 2^10 columns fits in float64's 53 bits. Then the order of additions in a matrix product,
    which depends on the number of threads, doesn't matter. What the slices leave out is below 2^-41
    of a row's largest element; the products of two lower slices are left out too. For each pair a
    bound on both, and on the rounding of the norms, is computed. Where that bound is too large, the
    distance is computed from the differences.

    Pairs are computed tile by tile: only `total` grows with the square of the cohort, and besides
    it only two float64 for every number in `points` are in memory.
    """
    deltas = points.to(torch.float64, copy=True)
    # By NumPy, whose sums are the same for any number of threads.
    deltas -= torch.from_numpy(deltas.numpy().mean(axis=0))
    norms = _squared_norms(deltas)
    # What the slices leave out of a row, times another row, is at most 2^-40 times the first row's
    # largest element times the second row's sum of magnitudes.
    largest = deltas.abs().amax(dim=1).numpy()
    sums = deltas.abs().numpy().sum(axis=1)
    high, low = _slices(deltas)
    low_norms = _squared_norms(low)
    tiles = [slice(begin, begin + _TILE) for begin in range(0, len(points), _TILE)]
    for first, second in combinations_with_replacement(tiles, 2):
        mixed = high[first] @ low[second].T
        mixed += low[first] @ high[second].T
        products = high[first] @ high[second].T
        products += mixed
        squared = norms[first, None] + norms[None, second] - 2 * products.numpy()
        left_out = 2 * np.sqrt(np.outer(low_norms[first], low_norms[second]))
        beyond = np.outer(largest[first], sums[second]) + np.outer(sums[first], largest[second])
        left_out += 2.0**-40 * beyond
        left_out += 2.0**-42 * (norms[first, None] + norms[None, second])
        inexact = left_out > _TOLERANCE * squared
        if first is second:
            squared, inexact = np.triu(squared, k=1), np.triu(inexact, k=1)
        _put_differences(squared, inexact, points[first], points[second])
        total[first, second] += squared
        total[second, first] += squared.T


def _squared_norms(rows: torch.Tensor) -> npt.NDArray[np.float64]:
    squares: npt.NDArray[np.float64] = np.einsum("ij,ij->i", rows.numpy(), rows.numpy())
    return squares


def _slices(deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the _BITS bits below each row's largest element, and the _BITS bits below those.

    The second result uses the memory of `deltas`.
    """
    largest = torch.maximum(deltas.amax(dim=1), -deltas.amin(dim=1))
    exponents = torch.frexp(largest).exponent.double()[:, None]
    # Adding and subtracting it rounds to multiples of 2^(exponent - _BITS).
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
    """Compute `squared` from differences, for the pairs of points and others that `where` marks."""
    rows, columns = np.nonzero(where)
    for begin in range(0, len(rows), _TILE):
        row, column = rows[begin : begin + _TILE], columns[begin : begin + _TILE]
        differences = (points[row].double() - others[column].double()).numpy()
        squared[row, column] = np.einsum("pk,pk->p", differences, differences)


def distances_between(squared: Matrix, coefficients: Matrix) -> Matrix:
    """Return the squared distances between the base and linear combinations of points.

    `squared` is [m + 1, m + 1], `coefficients` [k, m + 1] with rows that sum to 1. The result is
    [k + 1, k + 1], the base first: with d the difference of two rows, -d' squared d / 2.
    """
    base = np.eye(1, len(squared))
    points = np.vstack([base, coefficients])
    # einsum, not @: NumPy's own loop, the same for any number of threads.
    products = np.einsum("ik,jk->ij", np.einsum("ij,jk->ik", points, squared), points)
    own = products.diagonal()
    distances: Matrix = np.maximum(0.0, (products + products.T - own[:, None] - own[None, :]) / 2)
    is_close = distances < 1e-6 * squared.max(initial=0.0)
    for i, j in zip(*np.nonzero(np.triu(is_close, k=1)), strict=True):
        difference = points[i] - points[j]
        exact = -0.5 * np.einsum("j,jk,k->", difference, squared, difference)
        distances[i, j] = distances[j, i] = max(0.0, float(exact))
    np.fill_diagonal(distances, 0.0)
    return distances
