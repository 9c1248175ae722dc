"""The samples of a batch that make its step fail, and what is odd about each.

Nothing here knows a model: whether a part of a batch fails is asked of a function, as seldom as
possible. Where samples fail each on its own, the search is a group test: halves are tested, and
halves of those that fail (Hwang 1972, "A method for detecting all defective members in a population
by group testing"), single samples where more than 38 % of them fail (Ungar 1960, "The cutoff point
for group testing"). Where only a combination fails, it is delta debugging (Zeller and Hildebrandt
2002, "Simplifying and isolating failure-inducing input").
"""

import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from fedrounds.diagnosis.values import Oddity, SuspectSample
from fedrounds.doctor.batches import (
    IGNORED_LABEL,
    Batch,
    are_out_of_range,
    batch_size,
    inputs_of,
    labels_of,
    rows_of,
    take,
)
from fedrounds.outliers import OUTLIER_DEVIATIONS, OUTLIER_FACTOR, median_and_deviation

_OUTLIER_FACTOR_WITHOUT_HEALTHY = 100.0
_MAX_PROBES = 12
"""If so many samples, chosen at random, each fail alone, it isn't the samples: where half of a
batch of 32 is bad, this is wrong once in 100,000 times."""
_NUM_PROBES_BEFORE_PAIRS = 3
_MAX_PAIRS = 4
_MAX_PIECES = 8
_DENSE = (3 - math.sqrt(5)) / 2
_MIN_JUDGED = 8


class _OutOfTries(Exception):
    """The search may not ask again."""


class _Search:
    """Asks whether parts of a batch fail; never the same twice, never more often than allowed.

    `companions` are samples that go well and are put beside whatever is tested, for models that
    can't take a sample alone. `proven` are the samples shown to fail on their own.
    """

    def __init__(self, batch: Batch, fails: Callable[[Batch], bool], max_tries: int) -> None:
        self._batch = batch
        self._fails = fails
        self._num_tries_left = max_tries
        self._known: dict[frozenset[int], bool] = {}
        self._good: set[int] = set()
        self.proven: set[int] = set()
        self.companions: frozenset[int] = frozenset()

    def is_failing(self, positions: Iterable[int]) -> bool:
        chosen = frozenset(positions)
        if not chosen:
            return False
        if chosen not in self._known:
            if self._num_tries_left == 0:
                raise _OutOfTries
            self._num_tries_left -= 1
            self._known[chosen] = self._fails(take(self._batch, sorted(chosen)))
        return self._known[chosen]

    def is_bad(self, group: Sequence[int]) -> bool:
        """Whether this group fails, with the companions that it needs."""
        is_failing = self.is_failing(self.companions.union(group))
        if not is_failing:
            self._good.update(group)
        elif len(group) == 1:
            self.proven.update(group)
        return is_failing

    def is_dense(self) -> bool:
        """Whether so many fail that testing groups costs more than testing each."""
        num_judged = len(self.proven) + len(self._good)
        return num_judged >= _MIN_JUDGED and len(self.proven) > _DENSE * num_judged

    def calibrate(self, clean: Sequence[int]) -> None:
        """Choose the companions, given samples that go well together."""
        for size in (1, 2):
            if not self.is_failing(clean[:size]):
                self.companions = frozenset(clean[: size - 1])
                return
        self.companions = frozenset(clean)

    def find_bad(self, group: Sequence[int], *, is_known: bool) -> list[int]:
        """Return the samples of a group that are bad on their own; `is_known`: the group is."""
        if not is_known and self.is_dense():
            return [position for position in group if self.is_bad([position])]
        if not is_known and not self.is_bad(group):
            return []
        if len(group) == 1:
            return list(group) if self.is_bad(group) else []
        middle = len(group) // 2
        bad = self.find_bad(group[:middle], is_known=False)
        return bad + self.find_bad(group[middle:], is_known=not bad)

    def find_combination(self, failing: Sequence[int]) -> list[int]:
        """Return a smaller set, of two at least, that fails; the set itself if no smaller set does.

        Gives up where all but any eighth goes well: a combination of so many isn't a small set.
        """
        kept, pieces = list(failing), 2
        while len(kept) > 2:
            size = -(-len(kept) // pieces)
            parts = [kept[start : start + size] for start in range(0, len(kept), size)]
            rests = [[other for other in kept if other not in part] for part in parts]
            # The parts come first: they are the smaller.
            smaller = next(
                (part for part in [*parts, *rests] if len(part) >= 2 and self.is_failing(part)),
                None,
            )
            if smaller is not None:
                pieces = 2 if smaller in parts else max(len(parts) - 1, 2)
                kept = smaller
            elif size == 1 or (pieces >= _MAX_PIECES and len(kept) == len(failing)):
                break
            else:
                pieces *= 2
        return kept


def failing_samples(
    batch: Batch,
    fails: Callable[[Batch], bool],
    *,
    suspects: Sequence[int] | None = None,
    max_tries: int = 64,
) -> tuple[int, ...]:
    """Return the positions of a small set of samples that makes a failing batch fail.

    Where samples fail each on its own, these are all that do, and the batch was seen to go well
    without them. Where only a combination fails, it is a set that was seen to fail and none of
    whose parts was. Where a single sample can't be judged (BatchNorm refuses it), each is judged
    beside samples that go well. A set that looks odd is asked first and costs two or three calls,
    a single hidden sample of 32 about ten.

    Args:
        batch: fails as a whole.
        fails: whether the step fails with this part of the batch, from the same state; called
            with the samples in the batch's order.
        suspects: positions to ask first; by default what looks odd within the batch.
        max_tries: how often `fails` may be called, at least 1.

    Returns:
        Positions, rising. Empty if it isn't the samples: parts of every kind fail, or none does,
        or the batch has fewer than two. After max_tries what has been proven by then.
    """
    count = batch_size(batch)
    if count < 2:
        return ()
    if suspects is None:
        suspects = list(oddities(batch, num_classes=None, healthy=()))
    odd = [position for position in dict.fromkeys(suspects) if 0 <= position < count]
    search = _Search(batch, fails, max_tries)
    try:
        failing = _find(search, count, odd)
    except _OutOfTries:
        failing = search.proven
    return tuple(sorted(failing)) if len(failing) < count else ()


def _find(search: _Search, count: int, odd: Sequence[int]) -> set[int]:
    """Return the failing samples, all of them (or none) if it isn't the samples."""
    plain = [position for position in range(count) if position not in odd]
    # Shuffled, so that bad samples in a row don't hide that others are good.
    random.Random(count).shuffle(plain)
    if odd and plain and not search.is_failing(plain):
        if len(odd) == 1 and search.is_failing(odd):
            return set(odd)
        group, clean = list(odd), plain
    else:
        split = _split(search, [*odd, *plain])
        if split is None:
            return set()
        group, clean = split
    failing: set[int] = set()
    if clean:
        search.calibrate(clean)
        failing.update(search.find_bad(sorted(group), is_known=True))
    rest = [position for position in range(count) if position not in failing]
    while search.is_failing(rest) if failing else True:
        combination = search.find_combination(rest)
        if len(combination) == len(rest):
            break
        failing.update(combination)
        rest = [position for position in rest if position not in combination]
    return failing


def _split(search: _Search, order: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Return (samples that hold the bad samples, samples that go well together).

    The second is empty where only a combination can be at fault; None if everything fails.
    `order` has the oddest first.
    """
    middle = len(order) // 2
    halves = [list(order[:middle]), list(order[middle:])]
    failing = [search.is_failing(half) for half in halves]
    if failing == [False, False]:
        return list(order), []
    if failing != [True, True]:
        return halves[failing.index(True)], halves[failing.index(False)]
    plainest = list(order[::-1])
    clean = _probe(search, plainest)
    if clean is None:
        return None
    return [position for position in order if position not in clean], clean


def _probe(search: _Search, plainest: Sequence[int]) -> list[int] | None:
    """Return a sample, or two, that go well; None if too many in a row don't."""
    pairs = [list(plainest[start : start + 2]) for start in range(0, len(plainest) - 1, 2)]
    probes = [[position] for position in plainest[:_MAX_PROBES]]
    if len(plainest) > 2:
        probes[_NUM_PROBES_BEFORE_PAIRS:_NUM_PROBES_BEFORE_PAIRS] = pairs[:_MAX_PAIRS]
    return next((probe for probe in probes if not search.is_failing(probe)), None)


def oddities(
    batch: Batch,
    *,
    num_classes: int | None,
    healthy: Sequence[Batch],
    ignored: Collection[int] = (IGNORED_LABEL,),
) -> dict[int, SuspectSample]:
    """Return what is odd about each sample that is odd, by its position in the batch.

    Of several oddities a sample shows the first in this order:

    - NAN, INFINITY: `value` is how many of its inputs are; not where a healthy sample has such
      inputs, too: the model expects them then;
    - LABEL_OUT_OF_RANGE: a label below 0 or not below `num_classes`, unless it is in `ignored`;
      the label itself stays private, `value` is 0;
    - OUTLIER: in one of the tensors its largest absolute input is `value` >= 20 robust standard
      deviations (1.4826 times the median absolute deviation, at least a tenth of the median) above
      the median of the samples in `healthy` and the others in the batch, and 10 times the largest
      in `healthy` (without any: 100 times the median);
    - EMPTY: all inputs are zero, and no healthy sample's are.

    Args:
        batch: tensors with the samples in dimension 0; `inputs_of` are looked at.
        num_classes: number of classes, None if labels can't be judged.
        healthy: batches of the same structure that went well.
        ignored: labels that the loss passes over.
    """
    suspects: dict[int, SuspectSample] = {}

    def note(positions: Tensor, oddity: Oddity, values: Tensor) -> None:
        for position in positions.nonzero().flatten().tolist():
            value = float(values[position])
            suspects.setdefault(
                position, SuspectSample(position=position, oddity=oddity, value=value)
            )

    inputs = [_rows(tensor) for tensor in inputs_of(batch)]
    healthy_inputs = [[_rows(tensor) for tensor in inputs_of(other)] for other in healthy]
    count = batch_size(batch)
    none = torch.zeros(count)
    num_nan = sum((rows.isnan().sum(1) for rows in inputs), start=none)
    num_inf = sum((rows.isinf().sum(1) for rows in inputs), start=none)
    if not any(
        bool(rows.isnan().any()) for batch_inputs in healthy_inputs for rows in batch_inputs
    ):
        note(num_nan > 0, Oddity.NAN, num_nan)
    if not any(
        bool(rows.isinf().any()) for batch_inputs in healthy_inputs for rows in batch_inputs
    ):
        note(num_inf > 0, Oddity.INFINITY, num_inf)

    labels = labels_of(batch, num_classes=num_classes)
    if labels is not None and num_classes is not None:
        is_wrong = are_out_of_range(labels, num_classes, ignored)
        note(rows_of(is_wrong).any(1).cpu(), Oddity.LABEL_OUT_OF_RANGE, none)

    deviations = none.double()
    for number, rows in enumerate(inputs):
        others = [_largest(other[number]) for other in healthy_inputs if number < len(other)]
        reference = torch.cat(others) if others else torch.zeros(0, dtype=torch.float64)
        deviations = torch.maximum(deviations, _deviations(_largest(rows), reference))
    note(deviations >= OUTLIER_DEVIATIONS, Oddity.OUTLIER, deviations)

    empty_before = [bool(_is_empty(other).any()) for other in healthy_inputs if other]
    if inputs and empty_before and not any(empty_before):
        note(_is_empty(inputs), Oddity.EMPTY, none)
    return suspects


def _rows(tensor: Tensor) -> Tensor:
    """Return float [n, ...] as float64 [n, entries] on the CPU."""
    return rows_of(tensor.detach().to("cpu", torch.float64))


def _largest(rows: Tensor) -> Tensor:
    """Return float64 [n]: each row's largest absolute finite entry, 0 without any."""
    if rows.shape[1] == 0:
        return torch.zeros(len(rows), dtype=torch.float64)
    return rows.abs().nan_to_num(nan=0.0, posinf=0.0).amax(1)


def _is_empty(inputs: Sequence[Tensor]) -> Tensor:
    """Return bool [n]: whether all of a sample's entries are zero."""
    return torch.stack([(rows == 0).all(1) for rows in inputs]).all(0)


def _deviations(largest: Tensor, healthy: Tensor) -> Tensor:
    """Return float64 [n]: how far out each of `largest` is, 0 for what is no outlier at all."""
    result = torch.zeros_like(largest)
    for position in range(len(largest)):
        others = torch.cat([largest[:position], largest[position + 1 :], healthy])
        if len(others) == 0:
            continue
        median, deviation = median_and_deviation(others)
        limit = (
            OUTLIER_FACTOR * healthy.max()
            if len(healthy)
            else _OUTLIER_FACTOR_WITHOUT_HEALTHY * median
        )
        if largest[position] > limit > 0:
            result[position] = (largest[position] - median) / deviation
    return result
