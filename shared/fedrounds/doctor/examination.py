"""Finding out why a training went wrong, by taking its steps again with one thing changed.

The verdict is the most specific cause whose removal alone heals it, in this order:

1. `not-reproducible`: the same steps give other bits, or go well without what was written into
   the weights between two steps; where only the optimizer's state was changed from outside,
   `optimizer-state`.
2. `loss-function`: more than a quarter of the samples have inputs that aren't finite, and with the
   guarded loss, in which a zero takes them away, all goes well. `bad-label`, `bad-data`: samples
   that look odd, or so few that the loss isn't defined for whatever the model answers, without
   which the step goes well.
3. `degenerate-batch`: a batch of a single sample, of none, or of copies of a sample, that goes well
   when joined with another batch; after 5 also any other batch that a module has no value for as
   a whole.
4. `precision`: the bad value came up in 16 bits, and in float32 all goes well.
5. `loss-function`: the bad value came up in the loss from outputs of an ordinary size, and the
   guarded loss goes well.
6. `bad-initialisation`, `received-model`: weights at the start unlike any usual weights, or
   answers beyond chance from the start, and the same steps go well from usual weights.
7. `optimizer-state`: the bad value came up in the optimizer's step, or its state is beyond what the
   gradients explain, and without its history all goes well.
8. `exploding-gradient`, `learning-rate`: clipping, or a lower rate, heals. Where both do, it is the
   gradient if that is as steep where the lower rate leads, and the rate otherwise.
9. `unknown`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedrounds.diagnosis.values import (
    MAX_SAMPLES,
    MAX_TREND,
    Cause,
    ExperimentName,
    Oddity,
    Origin,
    StepPhase,
    SuspectSample,
)
from fedrounds.doctor import interventions
from fedrounds.doctor.anomalies import (
    has_odd_optimizer_state,
    unusual_entries,
)
from fedrounds.doctor.batches import (
    Batch,
    batch_size,
    blurred,
    inputs_of,
    joined,
    labels_of,
    largest_input,
    rows_of,
    take,
)
from fedrounds.doctor.determinism import find_nondeterminism, largest_norm
from fedrounds.doctor.evidence import Evidence
from fedrounds.doctor.findings import Case, Finding
from fedrounds.doctor.history import (
    Recorded,
    restore_snapshot,
    take_snapshot,
)
from fedrounds.doctor.monitor import symptom_of
from fedrounds.doctor.outside import Written
from fedrounds.doctor.replay import OutOfTime
from fedrounds.doctor.samples import failing_samples, oddities

_MAX_TRIES = 64
_SMALL_SHARE = 0.25
_NO_WORSE = 1.25
_MOST = 0.5
_FEW = 8
_RARE = 0.02
"""So many samples, or this share of them, may be samples that the loss isn't defined for."""
_ROOM = 4.0
"""Inputs may be so many times as large as healthy inputs before they count as outliers."""
_LONGEST_RESTART = 48
_AT_ONCE = 2
_NARROW = ("float16", "bfloat16")


def _without_odd_ones(batch: Batch) -> Batch:
    """Return a batch without outliers that did no harm by chance: they aren't what is usual."""
    odd = {
        position
        for position, sample in oddities(batch, num_classes=None, healthy=()).items()
        if sample.oddity is Oddity.OUTLIER
    }
    kept = [position for position in range(batch_size(batch)) if position not in odd]
    return take(batch, kept) if odd and kept else batch


def examine(case: Case) -> Finding | None:
    """Find the cause; None if the suspicion was none. The training's state is used up.

    Where the time is up before a cause is found, it is unknown unless samples are known to fail.
    """
    evidence = Evidence(case)
    try:
        return _find(evidence)
    except OutOfTime:
        return _finding(evidence, Cause.BAD_DATA if evidence.samples else Cause.UNKNOWN)


def blame_outliers(case: Case) -> Finding | None:
    """Return a finding against the newest step's outliers; None without any, or with many.

    Whether they did harm is for the caller to prove, by going on without them.
    """
    evidence = Evidence(case)
    try:
        return _find_outliers(evidence)
    except OutOfTime:
        return None


def _find_outliers(evidence: Evidence) -> Finding | None:
    batch, start, step = evidence.bad.batch, evidence.start, evidence.noticed.step
    healthy = [_without_odd_ones(earlier) for earlier in evidence.healthy_batches()]
    odd = oddities(batch, num_classes=None, healthy=healthy)
    outliers = [sample for sample in odd.values() if sample.oddity is Oddity.OUTLIER]
    usual = [position for position in range(batch_size(batch)) if position not in odd]
    if not outliers or not usual or len(outliers) > _SMALL_SHARE * batch_size(batch):
        return None
    repeated = [traced.outcome.loss for traced in evidence.replay.run(start, step).steps]
    recorded = [earlier.outcome.loss for earlier in evidence.history.between(start.step, step)]
    if repeated != recorded:
        # What the steps without the outliers lead to would prove nothing.
        return None
    evidence.note(ExperimentName.UNCHANGED, is_healed=False)
    evidence.note(ExperimentName.WITHOUT_SAMPLES, is_healed=True, value=len(outliers))
    _blame(evidence, outliers, good=[take(batch, usual), *healthy])
    evidence.origin = Origin(phase=StepPhase.LOSS)
    evidence.was_sane_before = True
    return _finding(evidence, Cause.BAD_DATA)


def _find(evidence: Evidence) -> Finding | None:
    if not evidence.case.is_tried:
        # A label out of range ends a CUDA process for good: the batch is never tried as it is.
        evidence.before = evidence.start = take_snapshot(
            evidence.training, step=evidence.noticed.step - 1
        )
        return _finding(evidence, _look_at_samples(evidence) or Cause.UNKNOWN)
    live = take_snapshot(evidence.training, step=evidence.noticed.step)
    if (cause := _look_outside(evidence)) is not None:
        return _finding(evidence, cause)
    restore_snapshot(evidence.training, live)
    trajectory = evidence.trajectory = evidence.replay.run(evidence.start, evidence.noticed.step)
    if (cause := find_nondeterminism(evidence.case, trajectory, live)) is not None:
        evidence.note(ExperimentName.UNCHANGED, is_healed=True)
        if cause is Cause.OPTIMIZER_STATE:
            evidence.origin = Origin(phase=StepPhase.OPTIMIZER)
        return _finding(evidence, cause)
    has_gone_well = not trajectory.failed_at and evidence.replay.is_sane()
    if has_gone_well and not evidence.has_spoilt(trajectory):
        return None
    evidence.failed = evidence.bad = evidence.recorded(
        trajectory.failed_at or evidence.noticed.step
    )
    if evidence.failed is not evidence.noticed and not trajectory.steps[-1].outcome.is_finite:
        # It was noticed by what came of it.
        evidence.symptom = symptom_of(trajectory.steps[-1].outcome)
    evidence.before = trajectory.before
    evidence.find_origin()
    evidence.note(ExperimentName.UNCHANGED, is_healed=False)
    if not (evidence.is_loss_suspect() and evidence.guarded_step_goes_well()):
        evidence.find_onset()
    return _finding(evidence, _cause_of(evidence))


def _look_outside(evidence: Evidence) -> Cause | None:
    """Look whether the same steps go well without what was last written from outside.

    A replay from a state before that write leaves it out.
    """
    steps = evidence.history.steps
    written = [recorded for recorded in steps if recorded.written]
    if not written or len(written) > _SMALL_SHARE * len(steps):
        # A loop that writes in step after step means to.
        return None
    last = written[-1]
    starts = [snapshot for snapshot in evidence.history.snapshots if snapshot.step < last.step]
    if not starts:
        return None
    trajectory = evidence.replay.run(starts[-1], evidence.noticed.step)
    if trajectory.failed_at or not evidence.replay.is_sane():
        return None
    evidence.note(ExperimentName.UNCHANGED, is_healed=True)
    evidence.trajectory = trajectory
    evidence.bad = evidence.failed = last
    evidence.before = evidence.start = starts[-1]
    if last.written == {Written.OPTIMIZER_STATE}:
        evidence.origin = Origin(phase=StepPhase.OPTIMIZER)
        return Cause.OPTIMIZER_STATE
    return Cause.NOT_REPRODUCIBLE


def _cause_of(evidence: Evidence) -> Cause:
    """Return the first cause whose removal alone heals."""
    if evidence.mixes_dtypes:
        # Wider numbers would heal it, since all of them are of one dtype then; but the dtypes
        # are a mistake of the task's code, and no number is at fault.
        return Cause.UNKNOWN
    for look in (
        _look_at_mask,
        _look_at_samples,
        _look_at_batch,
        _look_at_precision,
        _look_at_loss,
        _look_at_draw,
        _look_at_statistics,
        _look_at_start,
        _look_at_optimizer,
        _look_at_rates,
    ):
        cause = look(evidence)
        if cause is not None:
            _add_contributing(evidence, cause)
            return cause
    if evidence.samples:
        # The samples don't look odd, and no other experiment shows more.
        return Cause.BAD_DATA
    if evidence.is_operation_guarded():
        evidence.note(ExperimentName.GUARDED_LOSS, is_healed=evidence.guarded_step_goes_well())
    evidence.try_step(
        ExperimentName.WITHOUT_BATCH, change=interventions.skipping(evidence.bad.step)
    )
    return Cause.UNKNOWN


def _look_at_mask(evidence: Evidence) -> Cause | None:
    """Look whether the task expects inputs that aren't finite, and its mask lets them through.

    NaN marks what is missing, and a zero that multiplies it doesn't take it away.
    """
    batch = evidence.bad.batch
    is_bad = [~rows_of(inputs).isfinite().all(dim=1).cpu() for inputs in inputs_of(batch)]
    num_bad = int(torch.stack(is_bad).any(dim=0).sum()) if is_bad else 0
    if evidence.bad.treatment.guards or num_bad <= _SMALL_SHARE * batch_size(batch):
        return None
    if not evidence.guarded_step_goes_well():
        return None
    evidence.note(ExperimentName.GUARDED_LOSS, is_healed=True)
    return Cause.LOSS_FUNCTION


def _look_at_samples(evidence: Evidence) -> Cause | None:
    bad, num_classes = evidence.bad, evidence.training.num_classes
    count = batch_size(bad.batch)
    healthy = [_without_odd_ones(batch) for batch in evidence.healthy_batches()]
    odd = oddities(
        bad.batch, num_classes=num_classes, healthy=healthy, ignored=evidence.training.ignored
    )
    if evidence.is_finite_case():
        # What isn't finite in the input is no reason for a loss that is.
        not_finite = (Oddity.NAN, Oddity.INFINITY)
        odd = {
            position: sample for position, sample in odd.items() if sample.oddity not in not_finite
        }
    can_try = evidence.case.is_tried
    wrong = [sample for sample in odd.values() if sample.oddity is Oddity.LABEL_OUT_OF_RANGE]
    others = [position for position in range(count) if position not in odd]
    if not can_try:
        positions: tuple[int, ...] = tuple(sample.position for sample in wrong)
    elif len(odd) == 1 and others and evidence.step_goes_well(take(bad.batch, others)):
        # The whole batch fails and the rest doesn't: there is no smaller set.
        positions = tuple(odd)
    else:
        positions = failing_samples(
            bad.batch,
            lambda part: not evidence.step_goes_well(part),
            suspects=list(odd),
            max_tries=_MAX_TRIES if odd else _MAX_TRIES // 4,
        )
    is_whole = count > 0 and len(odd) > _MOST * count
    if is_whole:
        positions = tuple(range(count))
    if not positions:
        return None
    rest = [position for position in range(count) if position not in positions]
    is_healed = (
        evidence.step_goes_well(take(bad.batch, rest))
        if rest
        else _fails_for_input(evidence, healthy)
    )
    evidence.note(ExperimentName.WITHOUT_SAMPLES, is_healed=is_healed, value=len(positions))
    is_label_error = isinstance(bad.outcome.error, IndexError) and (
        evidence.origin.phase is StepPhase.LOSS
    )
    unseen = Oddity.LABEL_OUT_OF_RANGE if is_label_error else Oddity.NONE
    if is_whole:
        # What makes most samples odd doesn't spare the others.
        unseen = next(iter(odd.values())).oddity
    suspects = [
        odd.get(position, SuspectSample(position=position, oddity=unseen)) for position in positions
    ]
    kinds = {sample.oddity for sample in suspects}
    if not is_healed or (kinds == {Oddity.NONE} and len(suspects) > _SMALL_SHARE * count):
        return None
    usual = [position for position in rest if position not in odd]
    _blame(evidence, suspects, good=[*([take(bad.batch, usual)] if usual else []), *healthy])
    if Oddity.LABEL_OUT_OF_RANGE in kinds:
        return Cause.BAD_LABEL
    if kinds == {Oddity.NONE}:
        # The samples don't look odd; but only they raise an error, or the loss isn't defined for
        # them.
        is_theirs = bad.outcome.error is not None or (
            evidence.is_loss_suspect()
            and evidence.origin.phase is StepPhase.LOSS
            and _are_rare(bad, len(positions))
            and evidence.fails_whatever_the_model(positions, rest)
        )
        return Cause.BAD_DATA if is_theirs else None
    if not can_try:
        return Cause.BAD_DATA
    limit = evidence.max_input
    evidence.try_step(
        ExperimentName.INPUTS_SANITISED,
        change=interventions.sanitising(limit),
        value=limit,
    )
    return Cause.BAD_DATA


def _blame(evidence: Evidence, suspects: Sequence[SuspectSample], *, good: Sequence[Batch]) -> None:
    """Name samples of the bad step; the batches in `good` say how large an input may be."""
    evidence.num_samples = len(suspects)
    evidence.samples = tuple(
        replace(sample, index=evidence.index_of(sample.position))
        for sample in suspects[:MAX_SAMPLES]
    )
    evidence.max_input = _ROOM * largest_input(*good) or math.inf


def _are_rare(bad: Recorded, num_samples: int) -> bool:
    """Whether so few samples were left out that the task can't expect what they share."""
    num_seen = bad.step * batch_size(bad.batch)
    return len(bad.treatment.without) + num_samples <= max(_FEW, _RARE * num_seen)


def _fails_for_input(evidence: Evidence, healthy: Sequence[Batch]) -> bool:
    """Whether a batch of odd samples alone fails because of what is odd about them."""
    if evidence.bad.outcome.error is not None:
        return True
    limit = _ROOM * largest_input(*healthy) or math.inf
    return evidence.replay.goes_well(
        evidence.before, evidence.bad, evidence.bad.batch, change=interventions.sanitising(limit)
    )


def _look_at_batch(evidence: Evidence) -> Cause | None:
    batch = evidence.bad.batch
    healthy = evidence.healthy_batches()
    if batch_size(batch) == 0:
        step = evidence.bad.step
        is_healed = evidence.try_step(
            ExperimentName.WITHOUT_BATCH, change=interventions.skipping(step)
        )
        return Cause.DEGENERATE_BATCH if is_healed else None
    inputs = inputs_of(batch)
    is_same = bool(inputs) and all(bool((tensor == tensor[:1]).all()) for tensor in inputs)
    labels = labels_of(batch, num_classes=evidence.training.num_classes)
    ignored = evidence.training.ignored
    is_unlabelled = labels is not None and all(
        label in ignored for label in set(labels.flatten().tolist())
    )
    is_degenerate = batch_size(batch) == 1 or is_same or is_unlabelled
    if not is_degenerate:
        return None
    try:
        larger = joined(batch, healthy[-1] if healthy else blurred(batch))
    except RuntimeError:
        return None
    if evidence.try_step(ExperimentName.LARGER_BATCH, batch=larger):
        return Cause.DEGENERATE_BATCH
    return None


def _look_at_start(evidence: Evidence) -> Cause | None:
    start, fresh_state = evidence.history.snapshots[0], evidence.case.fresh_state
    if start.step != 0 or evidence.bad.step > _LONGEST_RESTART:
        # A restart that doesn't come to the fault proves nothing about it.
        return None
    fresh = fresh_state()
    restore_snapshot(evidence.training, start)
    is_initial = evidence.case.is_initial
    is_unusual = bool(unusual_entries(evidence.training.model, start, fresh, is_initial=is_initial))
    is_sane = has_odd_optimizer_state(start, largest_norm=1.0) or evidence.replay.is_sane()
    # A trained model's weights may be large and good; a broken model shows at once.
    is_late = not is_initial and evidence.bad.step > _AT_ONCE
    if is_sane and (is_late or not is_unusual):
        return None
    interventions.load_weights(evidence.training, fresh)
    restarted = evidence.trials.run(
        ExperimentName.FRESH_INITIALISATION,
        start,
        min(evidence.noticed.step, _LONGEST_RESTART),
        prepare=lambda: interventions.load_weights(evidence.training, fresh),
        highest=_NO_WORSE * evidence.replay.probe_loss(),
    )
    if restarted is None:
        return None
    return Cause.BAD_INITIALISATION if is_initial else Cause.RECEIVED_MODEL


def _look_at_precision(evidence: Evidence) -> Cause | None:
    parameters = list(evidence.training.model.parameters())
    has_narrow = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in parameters)
    if evidence.origin.dtype not in _NARROW and not has_narrow:
        return None
    is_healed = evidence.try_step(
        ExperimentName.FLOAT32,
        change=interventions.widening(),
        prepare=lambda: interventions.widen(evidence.training),
    )
    return Cause.PRECISION if is_healed else None


def _look_at_optimizer(evidence: Evidence) -> Cause | None:
    is_suspect = evidence.origin.phase is StepPhase.OPTIMIZER and evidence.origin.num_nan > 0
    if not is_suspect and not has_odd_optimizer_state(
        evidence.before,
        largest_norm=largest_norm(evidence.history, before=evidence.bad.step),
    ):
        return None
    is_healed = evidence.try_step(
        ExperimentName.FRESH_OPTIMIZER,
        prepare=lambda: interventions.forget_history(evidence.training),
    )
    return Cause.OPTIMIZER_STATE if is_healed else None


def _look_at_loss(evidence: Evidence) -> Cause | None:
    if evidence.bad.treatment.guards:
        # Where a guarded number was moved no gradient is left: that is the loss's fault still.
        is_at_fault = not evidence.step_is_finite(interventions.unguarding_loss())
        if is_at_fault:
            evidence.note(ExperimentName.GUARDED_LOSS, is_healed=False)
        return Cause.LOSS_FUNCTION if is_at_fault else None
    if not evidence.is_loss_suspect():
        return None
    is_healed = evidence.guarded_step_goes_well()
    evidence.note(ExperimentName.GUARDED_LOSS, is_healed=is_healed)
    return Cause.LOSS_FUNCTION if is_healed else None


def _look_at_draw(evidence: Evidence) -> Cause | None:
    """Look whether forward or loss failed for the random numbers that they drew.

    Then no rate and no weights are to blame, and the step is left out.
    """
    phases = (StepPhase.FORWARD, StepPhase.LOSS)
    is_suspect = evidence.has_come_up() and evidence.origin.phase in phases
    if not (is_suspect and evidence.was_sane_before and evidence.goes_well_with_other_draws()):
        return None
    # Parts of the batch went well because they drew other numbers.
    evidence.samples, evidence.num_samples = (), 0
    evidence.try_step(
        ExperimentName.WITHOUT_BATCH, change=interventions.skipping(evidence.bad.step)
    )
    return Cause.UNKNOWN


def _look_at_statistics(evidence: Evidence) -> Cause | None:
    """Look whether a module isn't defined for this batch as a whole, and is for a larger batch.

    The deviation of a column that is constant by chance is 0. No part of the batch is to blame, and
    the model was well.
    """
    is_in_module = evidence.origin.phase is StepPhase.FORWARD and evidence.origin.module
    is_suspect = is_in_module and evidence.has_come_up() and evidence.was_sane_before
    healthy = evidence.healthy_batches()
    if not is_suspect or evidence.samples or not healthy:
        return None
    try:
        larger = joined(evidence.bad.batch, healthy[-1])
    except RuntimeError:
        return None
    if not evidence.try_step(ExperimentName.LARGER_BATCH, batch=larger):
        return None
    if evidence.is_operation_guarded():
        evidence.note(ExperimentName.GUARDED_LOSS, is_healed=evidence.guarded_step_goes_well())
    return Cause.DEGENERATE_BATCH


def _look_at_rates(evidence: Evidence) -> Cause | None:
    verdict = evidence.trials.look_at_rates(
        evidence.start,
        until=evidence.noticed.step,
        usual_norm=evidence.case.usual_norm,
    )
    if verdict is None:
        return None
    cause, evidence.start = verdict
    return cause


def _add_contributing(evidence: Evidence, cause: Cause) -> None:
    """Try what is cheap besides: would it have helped, too?"""
    if cause in (Cause.LEARNING_RATE, Cause.EXPLODING_GRADIENT, Cause.UNKNOWN):
        return
    clip = evidence.case.usual_norm or 1.0
    evidence.try_step(
        ExperimentName.CLIPPED_GRADIENT, change=interventions.clipping(clip), value=clip
    )
    evidence.try_step(ExperimentName.LOWER_RATE, change=interventions.slowing(0.1), value=0.1)


def _finding(evidence: Evidence, cause: Cause) -> Finding:
    steps = evidence.trajectory.steps if evidence.trajectory is not None else ()
    return Finding(
        symptom=evidence.symptom,
        cause=cause,
        bad_step=evidence.bad if cause in _OF_THE_BATCH else evidence.failed,
        origin=evidence.origin,
        samples=evidence.samples if cause not in _OF_ALL_SAMPLES else (),
        num_samples=evidence.num_samples if cause not in _OF_ALL_SAMPLES else 0,
        max_input=evidence.max_input,
        experiments=tuple(evidence.experiments),
        trend=tuple(traced.point for traced in steps[-MAX_TREND:]),
        return_to=evidence.start if cause in _FROM_EARLIER else evidence.before,
        is_onset=evidence.was_sane_before,
        onset=evidence.bad,
        max_rate=evidence.trials.max_rate,
        num_replayed_steps=evidence.replay.num_steps,
    )


_OF_THE_BATCH = (Cause.BAD_DATA, Cause.BAD_LABEL, Cause.DEGENERATE_BATCH, Cause.UNKNOWN)
"""Reported with the step that harmed the model, others with the step where a bad value came up."""
_OF_ALL_SAMPLES = (Cause.LEARNING_RATE, Cause.EXPLODING_GRADIENT, Cause.OPTIMIZER_STATE)
"""That some samples show it more than others says nothing against these."""
_FROM_EARLIER = (Cause.LEARNING_RATE, Cause.EXPLODING_GRADIENT, Cause.NOT_REPRODUCIBLE)
