"""From a cause to what is done about it: the smallest thing that the experiments showed to work."""

from collections.abc import Iterator
from dataclasses import replace

from fedrounds.diagnosis.values import Cause, ExperimentName, Oddity, Remedy, RemedyKind
from fedrounds.doctor import interventions
from fedrounds.doctor.batches import batch_size
from fedrounds.doctor.findings import Finding
from fedrounds.doctor.monitor import INTERVAL
from fedrounds.doctor.stepping import Overrides

_OF_THE_BATCH = (Cause.BAD_DATA, Cause.BAD_LABEL, Cause.DEGENERATE_BATCH)
_MAX_SKIPS = 16
_SKIPPED_SHARE = 0.05
"""So many batches, and this share of them, may be left out for a known cause without counting."""


class Allowance:
    """Counts the remedies that a training has had against those it may get.

    One more batch left out for a cause that this was seen to heal is no new remedy, as long as
    such batches are few.
    """

    def __init__(self, max_remedies: int) -> None:
        self._num_left = max_remedies
        self._worked: set[Cause] = set()

    def grants(self, remedy: Remedy, finding: Finding, *, num_skipped: int) -> bool:
        """Count a remedy; False where none is left. `num_skipped` batches are left out so far."""
        is_known = finding.cause in self._worked and remedy.kind is RemedyKind.SKIP_BATCH
        are_few = num_skipped <= min(_MAX_SKIPS, _SKIPPED_SHARE * finding.bad_step.step)
        if is_known and are_few:
            return True
        self._num_left -= 1
        return self._num_left >= 0

    def remember(self, remedy: Remedy, finding: Finding) -> None:
        """Remember what was seen to work."""
        if remedy.kind is RemedyKind.SKIP_BATCH and finding.cause in _OF_THE_BATCH:
            self._worked.add(finding.cause)


def remedies_for(finding: Finding) -> Iterator[Remedy]:
    """Yield what may be done, the best first; nothing where only others can help.

    A received model or a first one is the server's to change, never a client's.
    """
    clip = finding.healing(ExperimentName.CLIPPED_GRADIENT)
    rate = finding.healing(ExperimentName.LOWER_RATE)
    match finding.cause:
        case Cause.BAD_DATA | Cause.BAD_LABEL:
            yield from _remedies_for_samples(finding)
        case Cause.DEGENERATE_BATCH:
            yield Remedy(kind=RemedyKind.SKIP_BATCH, value=batch_size(finding.bad_step.batch))
        case Cause.LOSS_FUNCTION if not finding.bad_step.treatment.guards:
            yield Remedy(kind=RemedyKind.GUARD_LOSS)
        case Cause.PRECISION:
            yield Remedy(kind=RemedyKind.USE_FLOAT32)
        case Cause.OPTIMIZER_STATE:
            yield Remedy(kind=RemedyKind.RESET_OPTIMIZER)
        case Cause.EXPLODING_GRADIENT if clip is not None:
            yield Remedy(kind=RemedyKind.CLIP_GRADIENT, value=clip.value)
        case Cause.LEARNING_RATE if rate is not None:
            yield Remedy(kind=RemedyKind.LOWER_RATE, value=rate.value)
        case Cause.NOT_REPRODUCIBLE:
            yield Remedy(kind=RemedyKind.REPEAT)
            yield Remedy(kind=RemedyKind.SKIP_BATCH)
        case Cause.UNKNOWN if finding.healing(ExperimentName.WITHOUT_BATCH) is not None:
            yield Remedy(kind=RemedyKind.SKIP_BATCH)
        case _:
            return


def applied(treatment: Overrides, remedy: Remedy, finding: Finding) -> Overrides:
    """Return a treatment with a remedy added to it, from the last good state on."""
    change = {
        RemedyKind.LOWER_RATE: interventions.slowing(remedy.value),
        RemedyKind.CLIP_GRADIENT: interventions.clipping(remedy.value),
        RemedyKind.SANITISE_INPUTS: interventions.sanitising(remedy.value),
        RemedyKind.GUARD_LOSS: interventions.guarding_loss(),
        RemedyKind.USE_FLOAT32: interventions.widening(),
        RemedyKind.SKIP_BATCH: interventions.skipping(finding.bad_step.step),
    }.get(remedy.kind)
    if change is not None:
        treatment = change(treatment)
    if remedy.kind is RemedyKind.LOWER_RATE:
        # A schedule that raises the rate must not undo it.
        return replace(
            treatment,
            max_rate=min(treatment.max_rate, remedy.value * finding.bad_step.outcome.lr),
            warmup_steps=INTERVAL,
            warmup_from=finding.return_to.step + 1,
        )
    if remedy.oddity is not Oddity.NONE and remedy.kind is not RemedyKind.SANITISE_INPUTS:
        # Also where a whole batch is left out: others may hold some of its kind.
        return replace(
            treatment,
            drops=treatment.drops | {one.oddity for one in finding.samples} - {Oddity.NONE},
            max_input=min(treatment.max_input, finding.max_input),
        )
    if remedy.kind is RemedyKind.SKIP_BATCH and finding.cause is Cause.DEGENERATE_BATCH:
        return replace(
            treatment, min_batch_size=max(treatment.min_batch_size, min(int(remedy.value) + 1, 2))
        )
    return treatment


def _remedies_for_samples(finding: Finding) -> Iterator[Remedy]:
    oddity = next(
        (one.oddity for one in finding.samples if one.oddity is not Oddity.NONE), Oddity.NONE
    )
    is_whole = finding.num_samples == batch_size(finding.bad_step.batch)
    if oddity is not Oddity.NONE and not is_whole:
        yield Remedy(kind=RemedyKind.DROP_SAMPLES, value=finding.max_input, oddity=oddity)
    yield Remedy(kind=RemedyKind.SKIP_BATCH, oddity=oddity)
    if finding.healing(ExperimentName.INPUTS_SANITISED) is not None:
        yield Remedy(kind=RemedyKind.SANITISE_INPUTS, value=finding.max_input, oddity=oddity)
