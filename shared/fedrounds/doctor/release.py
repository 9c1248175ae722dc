"""Giving a training its own rate and gradients back, step by step, once it goes well.

A lower rate, or a norm to clip at, is eased: first by a factor of two, then by the square of the
last factor, as long as learning goes on as well as before. Where it doesn't, training goes back to
before the easing. From there on the remedy is watched to the end: an eased rate may do harm late.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from fedrounds.doctor.history import Snapshot
from fedrounds.doctor.stepping import Overrides

_HOLD = 32
"""So many steps go well under a remedy, eased or not, before it is eased again."""
_NUM_JUDGED = 16
_NO_WORSE = 1.1
_NEGLIGIBLE = 0.02
"""A loss that rises by less than this share of the first loss hasn't risen."""
LOST = 0.25
"""A loss that takes this share of what was learned away is harm, whenever it comes."""
_LEAST_GROWTH = 2.0
_MOST_GROWTH = 256.0
_FREE = 64.0
"""A bound of so many times that of the remedy binds no more."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A state in which all went well, the overrides before it, and the loss that was usual."""

    start: Snapshot
    treatment: Overrides
    level: float


class Release:
    """Knows when a remedy may be eased, whether that did well, and where to go back to if not."""

    def __init__(self) -> None:
        self.checkpoint: Checkpoint | None = None
        self.is_on_trial = False
        self._next_at: int | None = None
        self._remedy: Overrides | None = None
        self._growth = _LEAST_GROWTH
        self._is_held = False

    def begin(self, treatment: Overrides, *, step: int) -> None:
        """Begin anew: a remedy has come into force."""
        self.stop()
        self._growth, self._is_held = _LEAST_GROWTH, False
        if _is_bound(treatment):
            self._remedy, self._next_at = treatment, step + _HOLD

    def stop(self) -> None:
        """Ease and watch no more."""
        self.checkpoint = self._next_at = self._remedy = None
        self.is_on_trial = False

    def tightened(self, treatment: Overrides) -> Overrides | None:
        """Return a treatment with the bounds that the remedy had before it was eased.

        None if it wasn't eased. What went wrong again is eased no more.
        """
        remedy = self._remedy
        if remedy is None:
            return None
        tight = _with_bounds(treatment, remedy)
        self.stop()
        return None if tight == treatment else tight

    def is_due(self, step: int) -> bool:
        """Whether the last steps are to be judged, and the next easing to be made."""
        return self._next_at is not None and step >= self._next_at

    def does_well(self, losses: Sequence[float], *, first_level: float) -> bool:
        """Whether learning goes on as well as before the easing on trial.

        Without an easing: whether what was learned at the last checkpoint is still there.
        """
        if self.checkpoint is None:
            return True
        level, now = self.checkpoint.level, level_of(losses)
        if not self.is_on_trial:
            learned = abs(first_level) - level
            return not (learned > 0 and now > level + LOST * learned)
        allowed = max(
            _NO_WORSE * abs(level) if level > 0 else level,
            level + _NEGLIGIBLE * abs(first_level),
        )
        return now <= allowed

    def ease(
        self, treatment: Overrides, start: Snapshot, losses: Sequence[float], *, step: int
    ) -> Overrides:
        """Return the overrides eased once, and put them on trial; `start` is the state now.

        Those that may not be eased any more are returned as they are, and watched.
        """
        if self.is_on_trial:
            self._growth = min(self._growth**2, _MOST_GROWTH)
        level = level_of(losses)
        if self.checkpoint is not None:
            level = min(level, self.checkpoint.level)
        self.checkpoint = Checkpoint(start=start, treatment=treatment, level=level)
        self._next_at = step + _HOLD
        eased = treatment if self._is_held else self._eased(treatment)
        self.is_on_trial = eased != treatment
        if not _is_bound(treatment):
            self.stop()
        return eased

    def back(self, *, step: int) -> Overrides:
        """Return the overrides to go on with from the checkpoint, where it goes wrong after it.

        After a large easing those before it. Else half of them, which aren't eased again: just
        below the rate that does harm at once lie rates that do it late.
        """
        assert self.checkpoint is not None
        before = self.checkpoint.treatment
        is_large = self.is_on_trial and self._growth > _LEAST_GROWTH
        self._is_held = not is_large
        self._growth = _LEAST_GROWTH
        self.is_on_trial = False
        self._next_at = step + _HOLD
        return before if is_large else self._halved(before)

    def _eased(self, treatment: Overrides) -> Overrides:
        remedy = self._remedy
        assert remedy is not None
        clip, first = treatment.clip_norm, remedy.clip_norm
        if clip is not None and first is not None:
            clip = self._growth * clip if self._growth * clip <= _FREE * first else None
        most = self._growth * treatment.max_rate
        return replace(
            treatment,
            rate_factor=min(1.0, self._growth * treatment.rate_factor),
            max_rate=most if most <= _FREE * remedy.max_rate else math.inf,
            warmup_steps=0,
            warmup_from=0,
            clip_norm=clip,
        )

    def _halved(self, treatment: Overrides) -> Overrides:
        remedy = self._remedy
        assert remedy is not None
        clip, first = treatment.clip_norm, remedy.clip_norm
        return replace(
            treatment,
            rate_factor=max(treatment.rate_factor / 2, remedy.rate_factor),
            max_rate=max(treatment.max_rate / 2, remedy.max_rate),
            clip_norm=first if clip is None or first is None else max(clip / 2, first),
        )


def _is_bound(treatment: Overrides) -> bool:
    """Whether rate or gradient are smaller than the training's own."""
    is_slowed = treatment.rate_factor != 1 or treatment.max_rate != math.inf
    return is_slowed or treatment.clip_norm is not None


def _with_bounds(treatment: Overrides, remedy: Overrides) -> Overrides:
    return replace(
        treatment,
        rate_factor=remedy.rate_factor,
        max_rate=remedy.max_rate,
        clip_norm=remedy.clip_norm,
    )


def level_of(losses: Sequence[float]) -> float:
    """Return the median of the last losses."""
    return median(losses[-_NUM_JUDGED:])
