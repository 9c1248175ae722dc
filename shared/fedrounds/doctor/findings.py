"""The case that an examination begins with, and the finding that it comes to."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedrounds.diagnosis.values import (
    Cause,
    Diagnosis,
    Experiment,
    ExperimentName,
    Origin,
    Remedy,
    RemedyKind,
    StepPhase,
    SuspectSample,
    Symptom,
    TrendPoint,
)
from fedrounds.doctor.batches import batch_size
from fedrounds.doctor.history import Recorded, Snapshot, StepHistory
from fedrounds.doctor.monitor import PHASES
from fedrounds.doctor.stepping import TrainingState


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training in which `symptom` was noticed in the newest step of its history.

    `is_tried` is False where that step was better not taken; `level` is the loss it began with,
    `usual_norm` the median gradient norm of its healthy steps; `fresh_state` gives usual initial
    weights by name, `on_replay` is called for every step repeated. The examination takes at most
    `max_seconds` of its thread's time, and `longest_s` by the clock.
    """

    training: TrainingState
    history: StepHistory
    symptom: Symptom
    is_tried: bool
    level: float
    usual_norm: float | None
    is_initial: bool
    fresh_state: Callable[[], Mapping[str, Tensor]]
    on_replay: Callable[[], None]
    max_seconds: float
    longest_s: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of an examination.

    `symptom` is what its bad step shows, if that isn't the step in which something was noticed;
    `return_to` is the last good state; with `is_onset` the model was still sane just before the bad
    step. `onset` is the step that harmed the model, which may lie before the bad step. Where a
    schedule raised the rate since the last good state, no step above `max_rate` went well.
    """

    symptom: Symptom
    cause: Cause
    bad_step: Recorded
    origin: Origin
    samples: tuple[SuspectSample, ...] = ()
    num_samples: int = 0
    max_input: float = math.inf
    experiments: tuple[Experiment, ...] = ()
    trend: tuple[TrendPoint, ...] = ()
    return_to: Snapshot
    is_onset: bool = False
    onset: Recorded
    max_rate: float = math.inf
    num_replayed_steps: int = 0

    def healing(self, name: ExperimentName) -> Experiment | None:
        """Return the last experiment of that name that healed, None if none did."""
        healed = [
            experiment
            for experiment in self.experiments
            if experiment.name is name and experiment.is_healed
        ]
        return healed[-1] if healed else None

    @property
    def contributing(self) -> tuple[ExperimentName, ...]:
        """What else healed it, though the cause is another; nothing where none is claimed."""
        if self.cause is Cause.UNKNOWN:
            return ()
        healed = [experiment.name for experiment in self.experiments if experiment.is_healed]
        return tuple(name for name in dict.fromkeys(healed) if name is not PROOFS.get(self.cause))


PROOFS: Mapping[Cause, ExperimentName] = {
    Cause.BAD_LABEL: ExperimentName.WITHOUT_SAMPLES,
    Cause.BAD_DATA: ExperimentName.WITHOUT_SAMPLES,
    Cause.DEGENERATE_BATCH: ExperimentName.LARGER_BATCH,
    Cause.RECEIVED_MODEL: ExperimentName.FRESH_INITIALISATION,
    Cause.BAD_INITIALISATION: ExperimentName.FRESH_INITIALISATION,
    Cause.PRECISION: ExperimentName.FLOAT32,
    Cause.OPTIMIZER_STATE: ExperimentName.FRESH_OPTIMIZER,
    Cause.LOSS_FUNCTION: ExperimentName.GUARDED_LOSS,
    Cause.EXPLODING_GRADIENT: ExperimentName.CLIPPED_GRADIENT,
    Cause.LEARNING_RATE: ExperimentName.LOWER_RATE,
    Cause.NOT_REPRODUCIBLE: ExperimentName.UNCHANGED,
}
"""The experiment that proves a cause."""


def diagnosis_of(finding: Finding, *, noticed_at: int, trend: tuple[TrendPoint, ...]) -> Diagnosis:
    """Return a finding as a diagnosis; `trend` is used where it has none of its own."""
    bad = finding.bad_step
    return Diagnosis(
        symptom=finding.symptom,
        cause=finding.cause,
        step=bad.step,
        noticed_at_step=noticed_at,
        epoch=bad.epoch,
        batch=bad.batch_number,
        batch_size=batch_size(bad.batch),
        lr=bad.outcome.lr,
        origin=finding.origin,
        samples=finding.samples,
        num_samples=finding.num_samples,
        experiments=finding.experiments,
        contributing=finding.contributing,
        trend=finding.trend or trend,
        returned_to_step=finding.return_to.step,
        num_replayed_steps=finding.num_replayed_steps,
    )


def unexplained(
    symptom: Symptom, step: Recorded, finding: Finding | None, *, trend: tuple[TrendPoint, ...]
) -> Diagnosis:
    """Return the diagnosis of a symptom that nothing heals: it claims no cause."""
    phase = PHASES.get(symptom, StepPhase.FORWARD)
    return Diagnosis(
        symptom=symptom,
        cause=Cause.UNKNOWN,
        step=step.step,
        noticed_at_step=step.step,
        epoch=step.epoch,
        batch=step.batch_number,
        batch_size=step.outcome.batch_size,
        lr=step.outcome.lr,
        origin=Origin(phase=phase) if finding is None else finding.origin,
        experiments=() if finding is None else finding.experiments,
        trend=trend,
        remedy=Remedy(kind=RemedyKind.NONE, is_working=True),
    )
