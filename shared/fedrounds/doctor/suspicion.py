"""From a suspicion to evidence: a finite training is touched only if that is shown to help.

A loss that jumps may be the next task, a term that sets in, or a hard batch. So training goes on as
it is, and only what persists is looked into. What a remedy is worth is then measured by going on:
from the same state, over the same steps up to now, beside what the training came to without it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from fedrounds.diagnosis.values import Symptom
from fedrounds.doctor.history import Snapshot

SUSPICIONS = (Symptom.LOSS_EXPLOSION, Symptom.DEAD_NETWORK, Symptom.COLLAPSE)
CERTAIN = (Symptom.DEAD_NETWORK, Symptom.COLLAPSE)
"""Where these persist nothing is learned any more: they are reported even if nothing helps."""
PATIENCE = 24
"""So many steps a suspicion is watched, all on other batches."""
_NUM_JUDGED = 8
_REMOVED = 0.5
"""A remedy takes away at least this share of the harm, or there was none that it could heal."""
_NEAR_BEST = 0.9
_AS_GOOD = 0.25
"""A remedy is as good as the best if its loss is higher by at most this share of the usual loss."""
_LONGEST_QUIET = 4096
_RISEN = 0.02
"""A loss that is higher by less than this share of the first level hasn't risen."""


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """What was noticed in `step`; `start` is a state before it.

    `usual` is the loss that was usual before, None where there were too few losses; `bar` the
    loss above which the suspicion persists.
    """

    symptom: Symptom
    step: int
    start: Snapshot
    usual: float | None
    bar: float

    def is_ripe(self, step: int) -> bool:
        """Whether it was watched for long enough."""
        return step >= self.step + PATIENCE


class Quiet:
    """After a suspicion that was unfounded the next has to wait, twice as long each time."""

    def __init__(self) -> None:
        self._until = 0
        self._length = PATIENCE

    def holds(self, step: int) -> bool:
        """Whether suspicions are passed over."""
        return step < self._until

    def begin(self, step: int) -> None:
        """Pass suspicions over from a step on."""
        self._until = step + self._length
        self._length = min(2 * self._length, _LONGEST_QUIET)


def last_level(losses: Sequence[float]) -> float:
    """Return the median of the last losses; infinite if any of them isn't finite."""
    last = list(losses)[-_NUM_JUDGED:]
    return median(last) if last and all(math.isfinite(loss) for loss in last) else math.inf


def has_risen(losses: Sequence[float], *, usual: float, first_level: float) -> bool:
    """Whether the last losses are twice the usual loss or more, and that is no small matter."""
    rise = last_level(losses) - usual
    return rise >= max(abs(usual), _RISEN * abs(first_level))


def choose(
    live: float, levels: Sequence[float], *, usual: float | None, is_learning: bool = True
) -> int | None:
    """Return which remedy to take, the mildest being the first; None if none helps enough.

    `live` is the loss that the training came to without any, `levels` what it came to under each.
    Harm is what lies between `live` and the `usual` loss before, of which half has to go; where
    that isn't known the loss has to fall by half. Of several that help about as much the first is
    taken. Where nothing is learned any more (not `is_learning`), a little less loss is evidence
    enough.
    """
    best = min(levels, default=math.inf)
    if not best < live:
        return None
    if usual is None:
        least = _REMOVED if is_learning else _NEAR_BEST
        is_enough = best < least * live if live > 0 else True
    else:
        harm = live - usual
        is_enough = harm > 0 and live - best >= _REMOVED * harm
    if not is_enough:
        return None
    # Beside a loss that exploded by powers of ten every remedy looks as good as the best: what
    # counts then is what is left, on the scale of the usual loss.
    room = min((1 - _NEAR_BEST) * (live - best), _AS_GOOD * max(abs(best), abs(usual or 0.0)))
    return next(number for number, level in enumerate(levels) if level - best <= room)
