"""Whether the same steps from the same state give the same bits: without that nothing is proven."""

import math

from fedrounds.diagnosis.values import Cause, Symptom
from fedrounds.doctor.anomalies import differ_in_optimizer_state, has_odd_optimizer_state
from fedrounds.doctor.findings import Case
from fedrounds.doctor.history import Snapshot, StepHistory, take_snapshot
from fedrounds.doctor.replay import Trajectory
from fedrounds.doctor.stepping import StepOutcome

_STATE_SYMPTOMS = (
    Symptom.NON_FINITE_PARAMETER,
    Symptom.NON_FINITE_BUFFER,
    Symptom.NON_FINITE_OPTIMIZER_STATE,
)


def find_nondeterminism(case: Case, trajectory: Trajectory, live: Snapshot) -> Cause | None:
    """Return the cause if the same steps gave other bits, None if they gave the same bits.

    `trajectory` is the unchanged replay from the newest state on, which the training still is in;
    `live` the state in which something was noticed. Where all that differs is the optimizer's
    state, that was changed from outside, and it is the cause; elsewhere none is claimed.
    """
    noticed = case.history.steps[-1]
    recorded = case.history.between(case.history.snapshots[-1].step, noticed.step)
    for original, retaken in zip(recorded, trajectory.steps, strict=False):
        if _is_same(original.outcome, retaken.outcome):
            continue
        # A step whose loss or gradient is bad was not taken: the states before it compare.
        is_untouched = original is noticed and not original.outcome.is_finite
        norm = largest_norm(case.history, before=original.step)
        if is_untouched and differ_in_optimizer_state(live, trajectory.before):
            return Cause.OPTIMIZER_STATE
        if has_odd_optimizer_state(live, largest_norm=norm):
            return Cause.OPTIMIZER_STATE
        return Cause.NOT_REPRODUCIBLE
    if case.symptom in _STATE_SYMPTOMS and not trajectory.failed_at:
        # The steps agree, and what they led to doesn't.
        replayed = take_snapshot(case.training, step=live.step)
        has_other_history = differ_in_optimizer_state(live, replayed)
        return Cause.OPTIMIZER_STATE if has_other_history else Cause.NOT_REPRODUCIBLE
    return None


def largest_norm(history: StepHistory, *, before: int) -> float:
    """Return the largest norm of a gradient that was learned from before a step; at least 0."""
    earlier = [recorded.outcome for recorded in history.steps if recorded.step < before]
    norms = [
        outcome.grad_norm
        for outcome in earlier
        if outcome.is_finite and outcome.grad_norm is not None
    ]
    return max(norms, default=1.0)


def _is_same(outcome: StepOutcome, again: StepOutcome) -> bool:
    """Whether two takes of a step have the same bits, as far as loss and gradient norm tell."""

    def alike(first: float, second: float) -> bool:
        return first == second or (math.isnan(first) and math.isnan(second))

    norms = (outcome.grad_norm, again.grad_norm)
    return (
        alike(outcome.loss, again.loss)
        # Not every step's gradient was measured.
        and (norms[0] is None or norms[1] is None or alike(norms[0], norms[1]))
        and type(outcome.error) is type(again.error)
    )
