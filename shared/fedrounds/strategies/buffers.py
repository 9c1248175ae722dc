"""Bounds the entries of kind MEAN (mostly float buffers) relative to the cohort.

The strategy's aggregator averages these entries by its own weights, as it does parameters. First
they are bounded, so that no single client can move them far: no norm of a delta covers them, and
one running mean of 1e30 would ruin every model that evaluates with it.

For each entry, let b be the global model's value and m the coordinate-wise median of the updates.
An update's excess is the distance of each of its elements from the range between b and m. Inside
that range everything is allowed, because a client that took few steps has moved only part of the
way. The excess is bounded, in its L2 norm and in its largest element, by the larger of

- the width times the median, over the cohort, of the updates' distances from m: how far apart
  clients are anyway, and
- the median of the norms of the updates' own values: a value of the usual size is never too far.

A larger excess is shortened to the bound, as in centered clipping (Karimireddy et al. 2021); the
rest of the update counts in full. An update is reported if less than NAMED_SHARE of its excess
counts. Honest clients with unusual data exceed the bound by a small factor (the variances of
clients with two labels each), and an attacker who does the same moves the mean no further.

So one of n clients moves a mean of equal weights out of the range from b to m by at most width / n
times the typical difference between clients, or by 1 / n of a usual value. The bound is relative:
clients whose inputs differ by orders of magnitude all pass if no majority agrees on a scale. The
centre is the median and not b: around b, an attacker who always stays at the bound would push the
model, and the bound with it, a little further each round.

The width is REACH * RARITY^(1/k): large if only few values show how far apart clients are. The
median distance is small by chance if n // 2 updates besides the median happen to be close to it in
each element. k counts these coincidences: n // 2 for each element in which no two updates are
equal. The probability that honest clients' largest excess is w times the median distance falls as
w^-k (each coincidence is proportional to the required closeness). So the probability of a false
alarm is equally small for a scalar of three clients (a width of ten million) and for a thousand
channels (REACH). tests/unit/server/test_buffers.py measures it.

An entry with an impossible element doesn't count at all: where the global model's is possible, a
value that isn't finite, or a negative running variance of a norm layer. The middle of the other
updates (or the global model's value if there is none) stands in for it, so that no aggregator, be
it a mean or a selection, needs to know. Entries of kind MAX are treated so too.

Limits: two updates can't be compared with anything, and half of a cohort or more can move the
median.

An entry that most updates leave unchanged (a mask, a table of positions) stays bit for bit the
same, whatever it holds: a change by a minority has no effect, so it is no incident. An entry that
is equal in all updates becomes that value. An element that isn't finite in the global model stays
so until every update has a finite value for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedrounds.strategies.blocks import Block, Cohort, RowReader, blocks_of, elements_per_row
from fedrounds.strategies.components import Matrix
from fedrounds.tensors.rounding import rounded
from fedrounds.types import EntryKind

REACH = 10.0
"""The smallest width: an entry may always deviate this many times as far as is typical."""

NAMED_SHARE = 0.1
"""An update is reported if its excess is shortened to less than this share."""

RARITY = 1e6
"""The factor by which chance alone may make the median distance too small."""

_MIN_COHORT = 3


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """An update's entry whose excess is shortened to less than NAMED_SHARE.

    `update` is the update's index in the cohort, from 0. `excess` is the L2 norm of the excess,
    `share` the share of it that counts. Of an entry that doesn't count at all the excess is
    infinite, the share 0, and `impossible` the first value that can't be right.
    """

    update: int
    name: str
    excess: float
    share: float
    impossible: float | None = None


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """A cohort with bounded entries of kind MEAN.

    `cohort` holds the updates with bounded values. `unchanged` entries stay as in the base;
    `agreed` entries become the value that all updates hold; `bounded` are the entries to report.
    """

    cohort: Cohort
    unchanged: frozenset[str] = frozenset()
    agreed: frozenset[str] = frozenset()
    bounded: Sequence[Bounded] = field(default_factory=tuple)


def bound_buffers(cohort: Cohort) -> Buffers:
    """Return a cohort whose entries of kinds MEAN and MAX are bounded as the module says.

    The result depends on the cohort's files alone. Only these entries are read, block by block, and
    only replaced values stay in memory.

    Raises:
        StorageDamaged: one of the files is shorter than its layout, or gone.
    """
    if not cohort.updates:
        return Buffers(cohort=cohort)
    entries = [
        name
        for name, kind in cohort.kinds.items()
        if kind is EntryKind.MEAN
        or (kind is EntryKind.MAX and cohort.base.layout.entries[name].dtype.is_floating_point)
    ]
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
        entry = _bound_entry(cohort, rows, blocks[name], name)
        if entry.is_unchanged:
            unchanged.add(name)
        elif entry.is_agreed:
            agreed.add(name)
        for index, values in entry.replaced.items():
            replaced[index][name] = values
        bounded.extend(entry.bounded)
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
class _BoundEntry:
    """An entry of a cohort; `replaced` holds the flattened values of updates, by index."""

    is_unchanged: bool
    is_agreed: bool
    replaced: Mapping[int, Tensor]
    bounded: Sequence[Bounded]


def _bound_entry(
    cohort: Cohort, rows: RowReader, blocks: Sequence[Block], name: str
) -> _BoundEntry:
    is_max = cohort.kinds[name] is EntryKind.MAX
    impossible = _impossible(rows, blocks, is_variance=name in cohort.variances)
    counted = [index for index in range(len(cohort.updates)) if index not in impossible]
    replaced: dict[int, Tensor] = {}
    if impossible:
        rows = RowReader([cohort.base, *(cohort.updates[index] for index in counted)])
        stand_in = _middle_values(rows, blocks, is_base=is_max or not counted)
        replaced = dict.fromkeys(impossible, stand_in)
    bounded = [
        Bounded(update=index, name=name, excess=math.inf, share=0.0, impossible=value)
        for index, value in impossible.items()
    ]
    if is_max or not counted:
        return _BoundEntry(
            is_unchanged=not counted, is_agreed=False, replaced=replaced, bounded=bounded
        )
    entry = _inspect(rows, blocks, num_updates=len(counted))
    for row, (index, share) in enumerate(zip(counted, entry.shares, strict=True)):
        if share == 1:
            continue
        if share < NAMED_SHARE:
            excess = float(entry.excesses[row])
            bounded.append(Bounded(update=index, name=name, excess=excess, share=share))
        replaced[index] = _shortened(rows, blocks, index=row, share=share)
    return _BoundEntry(
        is_unchanged=entry.is_unchanged,
        is_agreed=entry.is_agreed and len(cohort.updates) > 1,
        replaced=replaced,
        bounded=bounded,
    )


@dataclass(frozen=True, kw_only=True)
class _Entry:
    is_unchanged: bool
    is_agreed: bool
    excesses: Matrix
    shares: Sequence[float]


def _inspect(rows: RowReader, blocks: Sequence[Block], *, num_updates: int) -> _Entry:
    """Return whether the updates agree on an entry, and how far each of them deviates."""
    is_agreed = True
    has_changed = np.zeros(num_updates, dtype=bool)
    # A norm is kept as the largest magnitude and the sum of squares relative to it: the square of
    # 1e300 is more than float64 holds.
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
    # Of two different values, only a majority can say which is right.
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


def _impossible(rows: RowReader, blocks: Sequence[Block], *, is_variance: bool) -> dict[int, float]:
    """Return the updates with an element that can't be right, and the first such value of each."""
    impossible: dict[int, float] = {}
    for block in blocks:
        base, updates = _split(rows.read(block))
        if not base.is_floating_point():
            return {}
        is_bad = ~updates.isfinite() & base.isfinite()
        if is_variance:
            is_bad |= (updates < 0) & (base >= 0)
        for index in is_bad.any(dim=1).nonzero().flatten().tolist():
            value = float(updates[index][is_bad[index]][0])
            impossible.setdefault(index, value)
    return impossible


def _middle_values(rows: RowReader, blocks: Sequence[Block], *, is_base: bool) -> Tensor:
    """Return an entry's flattened median of the updates, the mean of two, or the base's values."""
    parts = []
    for block in blocks:
        base, updates = _split(rows.read(block))
        if is_base:
            parts.append(base.clone())
            continue
        ascending = updates.double().sort(dim=0).values
        low, high = ascending[(len(updates) - 1) // 2], ascending[len(updates) // 2]
        parts.append(rounded(torch.where(low == high, low, low / 2 + high / 2), base.dtype))
    return torch.cat(parts)


def _shortened(rows: RowReader, blocks: Sequence[Block], *, index: int, share: float) -> Tensor:
    """Return an update's flattened entry with its excess shortened, in the entry's dtype."""
    parts = []
    for block in blocks:
        base, updates = _split(rows.read(block))
        own = updates[index].double()
        nearest = own - _excess(updates[index : index + 1], base, _median(updates))[0]
        moved = nearest + share * (own - nearest)
        parts.append(rounded(torch.where(own.isfinite(), moved, own), base.dtype))
    return torch.cat(parts)


class _Norms:
    """L2 norms of rows given piece by piece, without overflow; `largest` are the maximum norms."""

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
        lengths: Matrix = self.largest * np.sqrt(self._squares)
        return lengths


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[0], rows[1:]


def _same_bits(values: Tensor, reference: Tensor) -> Tensor:
    size = values.element_size()
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return values.view(as_integers) == reference.view(as_integers)


def _median(updates: Tensor) -> Tensor:
    """Return the middle value of each column, float64 [count]; of two the lower."""
    # NaN sorts last.
    return updates.double().sort(dim=0).values[(len(updates) - 1) // 2]


def _excess(updates: Tensor, base: Tensor, median: Tensor) -> Tensor:
    """Return the distance of each update from the range between base and median, [n, count]."""
    anchor = torch.where(base.isfinite(), base.double(), median)
    values = updates.double()
    return values - values.clamp(torch.minimum(anchor, median), torch.maximum(anchor, median))


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0)


def _width(num_coincidences: int) -> float:
    """Return the width: the largest allowed excess over the median distance; see the module."""
    return float(REACH * RARITY ** (1 / max(1, num_coincidences)))


def _middle(values: Matrix) -> float:
    """Return the median, the upper of two: only half of the values together can raise it."""
    return float(np.sort(values)[len(values) // 2])


def _share(limit: float, value: float) -> float:
    return 1.0 if value <= limit else limit / value
