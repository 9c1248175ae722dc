"""From a cause to its remedies: the smallest change that the experiments showed to work."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedrounds.diagnosis.values import (
    Cause,
    ExperimentName,
    Oddity,
    Remedy,
    RemedyKind,
    RemedyPolicy,
)
from fedrounds.doctor import interventions
from fedrounds.doctor.batches import batch_size
from fedrounds.doctor.findings import Finding
from fedrounds.doctor.history import Recorded
from fedrounds.doctor.monitor import INTERVAL
from fedrounds.doctor.stepping import Overrides, TrainingState, prepared

OF_THE_RATE = (Cause.LEARNING_RATE, Cause.EXPLODING_GRADIENT)
OF_THE_START = (Cause.BAD_INITIALISATION, Cause.RECEIVED_MODEL)
"""Causes that are the server's to mend, never a client's."""
_ALWAYS_LEFT_OUT = 8
"""So many steps may be left out whatever the share."""


class Allowance:
    """Counts the remedies that a training has had against those it may get.

    Leaving samples or batches out counts by what is left out: of the steps at most `max_share`.
    """

    def __init__(self, max_remedies: int, *, max_share: float) -> None:
        self._max_remedies = self._num_left = max_remedies
        self._max_share = max_share

    def grants(self, remedy: Remedy, finding: Finding, *, num_skipped: int) -> bool:
        """Count a remedy; False where none is left. `num_skipped` batches are left out so far."""
        if self._max_remedies == 0:
            return False
        if remedy.kind is RemedyKind.SKIP_BATCH:
            return num_skipped < _ALWAYS_LEFT_OUT + self._max_share * finding.bad_step.step
        if remedy.kind is RemedyKind.DROP_SAMPLES:
            return True
        self._num_left -= 1
        return self._num_left >= 0


def remedies_for(finding: Finding) -> Iterator[Remedy]:
    """Yield what may be done, the best first; nothing where only others can help.

    Only the server may change a received or a first model, never a client.
    """
    clip = finding.healing(ExperimentName.CLIPPED_GRADIENT)
    rate = finding.healing(ExperimentName.LOWER_RATE)
    match finding.cause:
        case Cause.BAD_DATA | Cause.BAD_LABEL:
            yield from _remedies_for_samples(finding)
        case Cause.DEGENERATE_BATCH:
            if finding.healing(ExperimentName.GUARDED_LOSS) is not None:
                yield Remedy(kind=RemedyKind.GUARD_LOSS)
            yield Remedy(kind=RemedyKind.SKIP_BATCH, value=batch_size(finding.bad_step.batch))
        case Cause.LOSS_FUNCTION if not finding.bad_step.treatment.guards:
            yield Remedy(kind=RemedyKind.GUARD_LOSS)
        case Cause.PRECISION:
            yield Remedy(kind=RemedyKind.USE_FLOAT32)
        case Cause.OPTIMIZER_STATE:
            yield Remedy(kind=RemedyKind.RESET_OPTIMIZER)
        case Cause.EXPLODING_GRADIENT if clip is not None:
            yield Remedy(kind=RemedyKind.CLIP_GRADIENT, value=clip.value)
        case Cause.LEARNING_RATE if finding.healing(ExperimentName.FRESH_OPTIMIZER) is not None:
            # Its constants can't be stable at this rate: the rate is kept, and they are changed.
            yield Remedy(kind=RemedyKind.RESET_OPTIMIZER)
        case Cause.LEARNING_RATE if rate is not None:
            yield Remedy(kind=RemedyKind.LOWER_RATE, value=rate.value)
        case Cause.NOT_REPRODUCIBLE:
            yield Remedy(kind=RemedyKind.REPEAT)
            yield Remedy(kind=RemedyKind.SKIP_BATCH)
        case Cause.UNKNOWN if finding.healing(ExperimentName.GUARDED_LOSS) is not None:
            yield Remedy(kind=RemedyKind.GUARD_LOSS)
        case _:
            return


def candidates_for(
    finding: Finding, policy: RemedyPolicy, *, is_finite: bool, is_alone: bool
) -> list[Remedy]:
    """Return what may be done about a cause, the mildest first.

    `is_finite`: what was noticed is only suspicious, so that a remedy is wanted to compare with
    even where the policy is to report. `is_alone`: no step was left out for its rate just before.
    """
    skip = Remedy(kind=RemedyKind.SKIP_BATCH)
    if policy is RemedyPolicy.SKIP:
        return [skip]
    if (policy is RemedyPolicy.REPORT and not is_finite) or finding.cause in OF_THE_START:
        return []
    own = list(remedies_for(finding))
    if any(remedy.kind is RemedyKind.SKIP_BATCH for remedy in own):
        return own
    is_single_spike = finding.cause in OF_THE_RATE and is_alone
    return [skip, *own] if is_finite or is_single_spike else [*own, skip]


def applied(treatment: Overrides, remedy: Remedy, finding: Finding) -> Overrides:
    """Return a treatment with a remedy added to it, from the last good state on."""
    change = {
        RemedyKind.LOWER_RATE: (
            interventions.slowing(remedy.value)
            if math.isinf(finding.max_rate)
            else interventions.bounding_rate(finding.max_rate)
        ),
        RemedyKind.CLIP_GRADIENT: interventions.clipping(remedy.value),
        RemedyKind.SANITISE_INPUTS: interventions.sanitising(remedy.value),
        RemedyKind.GUARD_LOSS: interventions.guarding_loss(),
        RemedyKind.USE_FLOAT32: interventions.widening(),
        # Where all constants are stable this changes nothing.
        RemedyKind.RESET_OPTIMIZER: interventions.stabilising(),
        RemedyKind.SKIP_BATCH: interventions.skipping(
            (finding.onset if finding.cause in OF_THE_RATE else finding.bad_step).step
        ),
    }.get(remedy.kind)
    if change is not None:
        treatment = change(treatment)
    if remedy.kind is RemedyKind.LOWER_RATE:
        return replace(treatment, warmup_steps=INTERVAL, warmup_from=finding.return_to.step + 1)
    if remedy.kind is RemedyKind.DROP_SAMPLES and remedy.oddity is Oddity.NONE:
        step = finding.bad_step.step
        left_out = {(step, sample.position) for sample in finding.samples}
        return replace(treatment, without=treatment.without | left_out)
    if remedy.oddity is not Oddity.NONE and remedy.kind is not RemedyKind.SANITISE_INPUTS:
        # Also where a whole batch is left out: others may hold some of its kind.
        return replace(
            treatment,
            drops=treatment.drops | {sample.oddity for sample in finding.samples} - {Oddity.NONE},
            max_input=min(treatment.max_input, finding.max_input),
        )
    if remedy.kind is RemedyKind.SKIP_BATCH and finding.cause is Cause.DEGENERATE_BATCH:
        return replace(
            treatment, min_batch_size=max(treatment.min_batch_size, min(int(remedy.value) + 1, 2))
        )
    return treatment


def leaving_out_earlier(
    treatment: Overrides, finding: Finding, steps: Sequence[Recorded]
) -> Overrides:
    """Return a treatment that leaves a finding's samples out of all these steps.

    Samples without an oddity are known by their number in the data set; others by their oddity.
    """
    numbers = {sample.index for sample in finding.samples if sample.index >= 0}
    earlier = {
        (recorded.step, position)
        for recorded in steps
        for position, index in enumerate(recorded.indices or ())
        if int(index) in numbers
    }
    return replace(treatment, without=treatment.without | earlier)


def holds_left_out(recorded: Recorded, treatment: Overrides, training: TrainingState) -> bool:
    """Whether a recorded step learned from samples that a treatment leaves out."""
    if not recorded.outcome.is_taken:
        return False
    step, batch = recorded.step, recorded.batch
    before = prepared(batch, recorded.treatment, training, step=step)
    after = prepared(batch, treatment, training, step=step)
    return before is not None and (after is None or batch_size(after) < batch_size(before))


def _remedies_for_samples(finding: Finding) -> Iterator[Remedy]:
    oddity = next(
        (sample.oddity for sample in finding.samples if sample.oddity is not Oddity.NONE),
        Oddity.NONE,
    )
    is_whole = finding.num_samples == batch_size(finding.bad_step.batch)
    sanitising = finding.healing(ExperimentName.INPUTS_SANITISED)
    if is_whole and sanitising is not None:
        # What makes every sample of a batch odd is likely to do so in others.
        yield Remedy(kind=RemedyKind.SANITISE_INPUTS, value=finding.max_input, oddity=oddity)
    if not is_whole and len(finding.samples) == finding.num_samples:
        yield Remedy(kind=RemedyKind.DROP_SAMPLES, value=finding.max_input, oddity=oddity)
    yield Remedy(kind=RemedyKind.SKIP_BATCH, oddity=oddity)
    if not is_whole and sanitising is not None:
        yield Remedy(kind=RemedyKind.SANITISE_INPUTS, value=finding.max_input, oddity=oddity)
