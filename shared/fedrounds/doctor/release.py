"""Giving a training its own rate and gradients back, step by step, once it goes well.

A lower rate, or a norm to clip at, is eased by a factor of two at a time. Each time the losses
after it are compared with those before; where learning goes on less well it is taken back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from fedrounds.doctor.history import Snapshot
from fedrounds.doctor.stepping import Overrides

_HOLD = 32
"""So many steps go well under a remedy, or an eased one, before it is eased again."""
_NUM_JUDGED = 16
_NO_WORSE = 1.1
_NEGLIGIBLE = 0.02
"""A loss that rises by less than this share of the first one hasn't risen."""
_LEAST_CLIPPING = 64.0
"""A norm of so many times that of the remedy clips no more."""


@dataclass(frozen=True, kw_only=True)
class Easing:
    """An easing on trial: the state and the overrides before it, and the loss that was usual."""

    start: Snapshot
    before: Overrides
    level: float


class Release:
    """Knows when a remedy may be eased, and whether an easing did well."""

    def __init__(self) -> None:
        self.easing: Easing | None = None
        self._next_at: int | None = None
        self._first_clip: float | None = None
        self._remedy: Overrides | None = None

    def begin(self, treatment: Overrides, *, step: int) -> None:
        """Begin anew: a remedy has come into force."""
        self.easing = None
        is_easy = treatment.rate_factor == 1 and treatment.clip_norm is None
        self._next_at = None if is_easy else step + _HOLD
        self._first_clip = treatment.clip_norm
        self._remedy = None if is_easy else treatment

    def tightened(self, treatment: Overrides) -> Overrides | None:
        """Return a treatment with the rate and the norm that the remedy had before it was eased.

        None if it wasn't eased. What went wrong again is eased no more.
        """
        remedy, self._remedy = self._remedy, None
        if remedy is None:
            return None
        tight = replace(treatment, rate_factor=remedy.rate_factor, clip_norm=remedy.clip_norm)
        if tight == treatment:
            return None
        self.stop()
        return tight

    def is_due(self, step: int) -> bool:
        """Whether an easing is to be judged, or the next one to be made."""
        return self._next_at is not None and step >= self._next_at

    def does_well(self, losses: Sequence[float], *, first_level: float) -> bool:
        """Whether learning goes on as well as before the easing on trial."""
        if self.easing is None:
            return True
        allowed = max(
            _NO_WORSE * abs(self.easing.level) if self.easing.level > 0 else self.easing.level,
            self.easing.level + _NEGLIGIBLE * abs(first_level),
        )
        return level_of(losses) <= allowed

    def ease(
        self, treatment: Overrides, start: Snapshot, losses: Sequence[float], *, step: int
    ) -> Overrides:
        """Return the overrides eased once, and put them on trial; `start` is the state now."""
        eased = replace(
            treatment,
            rate_factor=min(1.0, 2 * treatment.rate_factor),
            warmup_steps=0,
            warmup_from=0,
            clip_norm=self._eased_norm(treatment.clip_norm),
        )
        if eased == treatment:
            self.stop()
            return treatment
        self.easing = Easing(start=start, before=treatment, level=level_of(losses))
        self._next_at = step + _HOLD
        return eased

    def stop(self) -> None:
        """Ease no more."""
        self.easing = self._next_at = None

    def _eased_norm(self, norm: float | None) -> float | None:
        if norm is None or self._first_clip is None:
            return None
        return None if 2 * norm > _LEAST_CLIPPING * self._first_clip else 2 * norm


def level_of(losses: Sequence[float]) -> float:
    """Return the median of the last losses."""
    return median(losses[-_NUM_JUDGED:])
