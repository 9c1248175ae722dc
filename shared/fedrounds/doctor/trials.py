"""Experiments over several steps: from a good state to where it went wrong, with one thing changed.

Lowering the rate and clipping the gradient are compared here. Where both heal, the gradient is to
blame if it is as steep where the lower rate leads: then it isn't the rate that led there.
"""

import math
from collections.abc import Callable

from fedrounds.diagnosis.values import Cause, Experiment, ExperimentName
from fedrounds.doctor import interventions
from fedrounds.doctor.batches import Batch
from fedrounds.doctor.constants import unstable_constant
from fedrounds.doctor.history import Snapshot, restore_settings, restore_snapshot
from fedrounds.doctor.release import LOST
from fedrounds.doctor.replay import Change, Replay, Trajectory
from fedrounds.doctor.stepping import UNTREATED

_RISEN = 2.0
"""Where a schedule raised the rate by more than this, a bound is tried instead of a factor."""
_RATE_FACTORS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12)
_JUMP = 10.0
_STEEP = 30.0
_NUM_LASTING = 24
"""A rate is judged by at least so many steps beside others, each a third of the rate before."""
_FURTHER = 0.9
_LOWER = 3.0
_NUM_LOWER = 8


class Trials:
    """Runs experiments on a replay, and writes them down in `experiments`."""

    def __init__(self, replay: Replay, experiments: list[Experiment]) -> None:
        self._replay = replay
        self._experiments = experiments
        self._has_stepped = False
        self._highest_rate: float | None = None
        self.max_rate = math.inf

    def run(
        self,
        name: ExperimentName,
        start: Snapshot,
        until: int,
        *,
        change: Change = lambda treatment: treatment,
        prepare: Callable[[], None] | None = None,
        convert: Callable[[Batch], Batch] = lambda batch: batch,
        value: float = 0.0,
        highest: float | None = None,
    ) -> Trajectory | None:
        """Take the steps since a state again; returns how that went if it went well.

        That is a sane model, or with `highest` a probe's loss of at most that (nan: any).
        """
        trajectory = self._replay.run(start, until, change=change, prepare=prepare, convert=convert)
        self._has_stepped = any(
            traced.outcome.is_taken and traced.outcome.is_finite for traced in trajectory.steps
        )
        treatment = change(UNTREATED)
        is_healed = not trajectory.failed_at and (
            self._replay.is_sane(treatment, is_strict=True)
            if highest is None
            else (math.isnan(highest) or self._replay.probe_loss() <= highest)
            and self._replay.is_alive()
        )
        self._experiments.append(
            Experiment(
                name=name,
                is_healed=is_healed,
                value=value,
                loss=trajectory.last_loss,
                failed_at_step=0 if is_healed else trajectory.failed_at or until,
            )
        )
        return trajectory if is_healed else None

    def look_at_rates(
        self, newest: Snapshot, *, until: int, usual_norm: float | None
    ) -> tuple[Cause, Snapshot] | None:
        """Return whether rate, gradient or precision is to blame, and the state to go back to."""
        clip = usual_norm or 1.0
        starts = [snapshot for snapshot in self._good_starts(newest) if snapshot.step < until]
        if not starts:
            return None
        for start in starts:
            if (cause := self._look_at_constants(start, until)) is not None:
                return cause, start
        restore_snapshot(self._replay.training, starts[-1])
        hopeless = None if self._replay.is_sane() else starts[-1]
        for start in starts:
            clipped = self.run(
                ExperimentName.CLIPPED_GRADIENT,
                start,
                until,
                change=interventions.clipping(clip),
                value=clip,
            )
            # Where the start itself is bad, no rate helps.
            slow = self._slow_enough(start, until) if start is not hopeless else None
            if clipped is not None and (slow is None or _is_steep(slow, usual_norm)):
                return Cause.EXPLODING_GRADIENT, start
            if slow is not None:
                return Cause.LEARNING_RATE, start
        training = self._replay.training
        # Written down and no cause: there is no more room than float32 to compute in.
        self.run(
            ExperimentName.FLOAT64,
            starts[-1],
            until,
            prepare=lambda: interventions.double(training),
            convert=interventions.doubled,
        )
        return None

    def _look_at_constants(self, start: Snapshot, until: int) -> Cause | None:
        """Return the cause where constants that can't be stable are to blame.

        That is the rate, if a lower rate heals as well: it is a factor of what the decay does.
        """
        training = self._replay.training
        restore_snapshot(training, start)
        restore_settings(training, self._replay.history.between(start.step, until)[-1])
        constant = unstable_constant(training.optimizer)
        if constant is None:
            return None
        stable = self.run(
            ExperimentName.FRESH_OPTIMIZER,
            start,
            until,
            change=interventions.stabilising(),
            prepare=lambda: interventions.forget_history(training),
            value=constant,
        )
        if stable is None:
            return None
        slow = self._slow_enough(start, until)
        return Cause.OPTIMIZER_STATE if slow is None else Cause.LEARNING_RATE

    def _slow_enough(self, start: Snapshot, until: int) -> Trajectory | None:
        """Lower the rate until it heals, and on as long as that leads further."""
        rates = [
            recorded.outcome.lr for recorded in self._replay.history.between(start.step, until)
        ]
        factors: tuple[float, ...] = _RATE_FACTORS
        self._highest_rate = None
        if max(rates) > _RISEN * rates[0] > 0:
            # What the schedule goes on to raise needs a bound, beginning with the last good rate.
            self._highest_rate = max(rates)
            good = rates[0] / self._highest_rate
            factors = (good, *(good * factor for factor in _RATE_FACTORS))
        for factor in factors:
            slow = self._at_rate(factor, start, until)
            if slow is not None:
                best = self._best_rate(factor, start, until)
                better = None if best == factor else self._at_rate(best, start, until)
                if self._highest_rate is not None:
                    self.max_rate = self._highest_rate * (best if better else factor)
                return better or slow
            if not self._has_stepped:
                # It fails before the rate has any say.
                return None
        return None

    def _at_rate(self, factor: float, start: Snapshot, until: int) -> Trajectory | None:
        return self.run(
            ExperimentName.LOWER_RATE,
            start,
            until,
            change=self._lowered(factor),
            value=factor,
        )

    def _lowered(self, factor: float) -> Change:
        if self._highest_rate is not None:
            return interventions.bounding_rate(factor * self._highest_rate)
        return interventions.slowing(factor)

    def _best_rate(self, factor: float, start: Snapshot, until: int) -> float:
        """Return the rate that leads furthest, from a rate that heals on downwards.

        A few steps hardly show whether a rate lasts: they are repeated.
        """
        num_times = -(-_NUM_LASTING // (until - start.step))

        def reached(factor: float, *, num_times: int = num_times) -> float:
            trajectory = self._replay.run(
                start, until, change=self._lowered(factor), num_times=num_times
            )
            return math.inf if trajectory.failed_at else self._replay.probe_loss()

        healing = factor
        restore_snapshot(self._replay.training, start)
        begun = self._replay.probe_loss()
        least, lower = reached(factor), reached(factor / 10)
        once = reached(factor, num_times=1), reached(factor / 10, num_times=1)
        if lower < least or once[1] < _FURTHER * once[0]:
            factor, least = factor / 10, lower
        for _ in range(_NUM_LOWER):
            lower = reached(factor / _LOWER)
            if not (lower < least or math.isinf(least)):
                break
            factor, least = factor / _LOWER, lower
        # Where no rate leads below the start, the lowest looks best because it hardly moves.
        return factor if least < begun else healing

    def _good_starts(self, newest: Snapshot) -> list[Snapshot]:
        """Return the newest state that is good beyond doubt, and the oldest.

        Good is what still has most of what the best state had learned: a late state may have lost
        it and be no worse than the first.
        """
        replay = self._replay
        oldest, *others = [
            snapshot for snapshot in replay.history.snapshots if snapshot.step <= newest.step
        ]
        sane: list[tuple[Snapshot, float]] = []
        for snapshot in others:
            restore_snapshot(replay.training, snapshot)
            if replay.is_sane(is_strict=True):
                sane.append((snapshot, replay.probe_loss()))
        if not sane:
            return [oldest]
        least = min(loss for _, loss in sane)
        level = least if replay.probe is None else abs(replay.probe.level)
        allowed = least + LOST * max(0.0, level - least)
        good = [snapshot for snapshot, loss in sane if math.isnan(loss) or loss <= allowed]
        return [good[-1], oldest]


def _is_steep(slow: Trajectory, usual_norm: float | None) -> bool:
    """Whether the gradient is far steeper than usual on the way that a lower rate takes.

    Without earlier steps to compare with, steep is a gradient thirty times the loss, and thirty.
    """
    steepest = max(traced.outcome.grad_norm or 0.0 for traced in slow.steps)
    if usual_norm is not None:
        return steepest > _JUMP * usual_norm
    return steepest > _STEEP * max(1.0, abs(slow.steps[0].outcome.loss))
