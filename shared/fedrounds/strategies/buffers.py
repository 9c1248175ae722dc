"""Entries of kind MEAN (float buffers, mostly): what a cohort makes of them before the strategy.

The strategy's aggregator averages these entries as it does parameters, by its own weights, but of
values that no single client can move far: no norm of a delta knows of them, and one running mean of
1e30 would ruin every model that evaluates with it.

For each entry let b be the global model's value and m the coordinate-wise median of the updates. An
update's excess is how far each of its elements lies outside the range from b to m. That range is
free, because a client that took few steps has moved only a part of the way. An excess is bounded,
in its L2 norm and in its largest element, by the larger of

- the width times the median over the cohort of the updates' distances from m: how far clients lie
  apart anyway, and
- the median of the norms of the updates' own values: what is of the usual size is never far.

A larger excess is shortened to the bound, as in centered clipping (Karimireddy et al. 2021); the
update counts otherwise. It is reported if less than NAMED_SHARE of it counts: honest clients whose
data are unlike the others' lie a few times beyond the bound (the variances of clients with two
labels each), and an attacker that lies there moves the mean no further.

So one of n clients moves a mean of equal weights, out of the range from b to m, by at most
width / n of what clients typically differ by, or by the n-th part of a usual value, and the bound
is relative: clients whose inputs differ by orders of magnitude all pass if no majority agrees on a
scale. The centre is the median and not b: bounded around b, an
attacker that always stands at the bound would push the model a little further each round, and the
bound with it.

The width is REACH * RARITY^(1/k): large where few values say how far clients lie apart. The median
distance is small by chance if n // 2 updates besides the median happen to lie close to it in each
element; k counts these coincidences, n // 2 for each element in which no two updates are equal. The
chance that honest clients' largest excess is w times the median distance falls as w^-k (each
coincidence is proportional to the closeness it asks for), so that the chance of a false alarm is
the same small one for a scalar of three clients (a width of ten million) and for a thousand
channels (REACH). tests/unit/server/test_buffers.py measures it.

Two updates have nothing to be compared with, and half of a cohort or more can move the median.

An entry that most updates leave as it is (a mask, a table of positions) stays bit for bit, whatever
it holds: a change that few make has no effect, so it is no incident. An entry that is the same in
all updates becomes exactly that. An element that isn't finite in the global model stays so until
every update has a number for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedrounds.strategies.blocks import Block, Cohort, RowReader, blocks_of, elements_per_row
from fedrounds.strategies.components import Matrix
from fedrounds.tensors.rounding import rounded
from fedrounds.types import EntryKind

REACH = 10.0
"""How many times further than its cohort typically does an update's entry may deviate, at least."""

NAMED_SHARE = 0.1
"""Whose excess is shortened to more than this is not reported."""

RARITY = 1e6
"""By what factor chance alone may make the median distance too small; the width allows for it."""

_MIN_COHORT = 3


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """An update whose entry is shortened to less than NAMED_SHARE; `update` counts from 0.

    `excess` is the L2 norm of what lies outside the range between global model and median, `share`
    how much of it counts.
    """

    update: int
    name: str
    excess: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """What a cohort makes of its entries of kind MEAN.

    `cohort` holds the updates with bounded values in place of those that go too far. `unchanged`
    entries stay as in the base; `agreed` entries become what every update holds; `bounded` are the
    updates to report.
    """

    cohort: Cohort
    unchanged: frozenset[str] = frozenset()
    agreed: frozenset[str] = frozenset()
    bounded: Sequence[Bounded] = field(default_factory=tuple)


def bound_buffers(cohort: Cohort) -> Buffers:
    """Return a cohort whose entries of kind MEAN are bounded as the module says.

    A function of the cohort's files. It reads these entries alone, block by block; only values that
    are replaced stay in memory.

    Raises:
        StorageDamaged: one of the files is shorter than its layout, or gone.
    """
    if not cohort.updates:
        return Buffers(cohort=cohort)
    entries = [name for name, kind in cohort.kinds.items() if kind is EntryKind.MEAN]
    longest = elements_per_row(len(cohort.updates) + 1)
    blocks: dict[str, list[Block]] = {name: [] for name in entries}
    for block in blocks_of(cohort.base.layout, max_elements=longest):
        if block.name in blocks:
            blocks[block.name].append(block)
    rows = RowReader([cohort.base, *cohort.updates])
    unchanged, agreed = set(), set()
    replaced: list[dict[str, Tensor]] = [{} for _ in cohort.updates]
    bounded: list[Bounded] = []
    for name in entries:
        found = _inspect(rows, blocks[name], num_updates=len(cohort.updates))
        if found.is_unchanged:
            unchanged.add(name)
        elif found.is_agreed and len(cohort.updates) > 1:
            agreed.add(name)
        for index, share in enumerate(found.shares):
            if share == 1:
                continue
            if share < NAMED_SHARE:
                excess = float(found.excesses[index])
                bounded.append(Bounded(update=index, name=name, excess=excess, share=share))
            replaced[index][name] = _shortened(rows, blocks[name], index=index, share=share)
    updates = [
        replace(update, replaced=values) if values else update
        for update, values in zip(cohort.updates, replaced, strict=True)
    ]
    return Buffers(
        cohort=replace(cohort, updates=updates),
        unchanged=frozenset(unchanged),
        agreed=frozenset(agreed),
        bounded=tuple(bounded),
    )


@dataclass(frozen=True, kw_only=True)
class _Entry:
    is_unchanged: bool
    is_agreed: bool
    excesses: Matrix
    shares: Sequence[float]


def _inspect(rows: RowReader, blocks: Sequence[Block], *, num_updates: int) -> _Entry:
    """Return what one entry's blocks show: who agrees, and how far each update goes."""
    is_agreed = True
    has_changed = np.zeros(num_updates, dtype=bool)
    # Norms are kept as the largest magnitude and the sum of squares relative to it: 1e300 squared
    # is more than float64 holds.
    excess, distance, size = (_Norms(num_updates) for _ in range(3))
    num_coincidences = 0
    for block in blocks:
        base, updates = _split(rows.read(block))
        is_changed = ~_same_bits(updates, base).all(dim=1).numpy()
        has_changed |= is_changed
        is_agreed &= bool(_same_bits(updates, updates[0]).all())
        size.add(_finite(updates.double()))
        if not is_changed.any():
            continue
        median = _median(updates)
        excess.add(_finite(_excess(updates, base, median)))
        distance.add(_finite(updates.double() - median))
        num_equal = (updates.double() == median).sum(dim=0)
        num_coincidences += int((num_updates // 2 + 1 - num_equal).clamp(min=0).sum())
    # Without a majority nobody can say which of two values is the right one.
    has_majority = num_updates >= _MIN_COHORT
    is_unchanged = bool(has_changed.sum() < (num_updates / 2 if has_majority else 1))
    shares = [1.0] * num_updates
    if has_majority and not is_unchanged:
        width = _width(num_coincidences)
        limits = [
            max(width * _middle(distances), _middle(sizes))
            for distances, sizes in (
                (distance.lengths, size.lengths),
                (distance.largest, size.largest),
            )
        ]
        shares = [
            min(1.0, *(_share(limit, value) for limit, value in zip(limits, values, strict=True)))
            for values in zip(excess.lengths, excess.largest, strict=True)
        ]
    return _Entry(
        is_unchanged=is_unchanged, is_agreed=is_agreed, excesses=excess.lengths, shares=shares
    )


def _shortened(rows: RowReader, blocks: Sequence[Block], *, index: int, share: float) -> Tensor:
    """Return an update's entry with its excess shortened, flattened, of the entry's dtype."""
    parts = []
    for block in blocks:
        base, updates = _split(rows.read(block))
        own = updates[index].double()
        nearest = own - _excess(updates[index : index + 1], base, _median(updates))[0]
        moved = nearest + share * (own - nearest)
        parts.append(rounded(torch.where(own.isfinite(), moved, own), base.dtype))
    return torch.cat(parts)


class _Norms:
    """L2 norms of rows that come in pieces, without overflow; `largest` are the maximum norms."""

    def __init__(self, num_rows: int) -> None:
        self.largest: Matrix = np.zeros(num_rows)
        self._squares: Matrix = np.zeros(num_rows)

    def add(self, piece: Tensor) -> None:
        """Add the next columns of all rows, float64 [num_rows, count]."""
        values = np.abs(piece.numpy())
        before = self.largest
        self.largest = np.maximum(before, values.max(axis=1, initial=0.0))
        unit = np.where(self.largest > 0, self.largest, 1.0)
        self._squares *= (before / unit) ** 2
        self._squares += np.square(values / unit[:, None]).sum(axis=1)

    @property
    def lengths(self) -> Matrix:
        """The L2 norms."""
        found: Matrix = self.largest * np.sqrt(self._squares)
        return found


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[0], rows[1:]


def _same_bits(values: Tensor, reference: Tensor) -> Tensor:
    size = values.element_size()
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return values.view(as_integers) == reference.view(as_integers)


def _median(updates: Tensor) -> Tensor:
    """Return the middle value of each column, float64 [count]; the lower one of two."""
    # NaN sorts last.
    return updates.double().sort(dim=0).values[(len(updates) - 1) // 2]


def _excess(updates: Tensor, base: Tensor, median: Tensor) -> Tensor:
    """Return by how much each update lies outside the range of base and median, [n, count]."""
    anchor = torch.where(base.isfinite(), base.double(), median)
    values = updates.double()
    return values - values.clamp(torch.minimum(anchor, median), torch.maximum(anchor, median))


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0)


def _width(num_coincidences: int) -> float:
    """Return how many times the median distance an excess may be; see the module."""
    return float(REACH * RARITY ** (1 / max(1, num_coincidences)))


def _middle(values: Matrix) -> float:
    """Return the median, the upper one of two: it takes half of the values to raise it."""
    return float(np.sort(values)[len(values) // 2])


def _share(limit: float, value: float) -> float:
    return 1.0 if value <= limit else limit / value
