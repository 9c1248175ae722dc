"""What is left of the doctor where it is off: stopping a training at what isn't finite."""

import math
from collections import deque
from typing import NamedTuple

from fedrounds.diagnosis.values import Cause, Diagnosis, Origin, StepPhase, Symptom, TrendPoint
from fedrounds.doctor.history import (
    are_finite,
    first_bad_gradient,
    is_finite,
    symptom_of_state,
)
from fedrounds.doctor.monitor import INTERVAL, PHASES, symptom_of
from fedrounds.doctor.stepping import StepOutcome, TrainingState

_NUM_TREND = 5


class _Past(NamedTuple):
    step: int
    epoch: int
    batch: int
    outcome: StepOutcome


class NanGuard:
    """Knows the last steps of a training, and says when it is to stop.

    A loss, a gradient or a parameter stops it at its step; buffers and the optimizer's state are
    looked at every eight steps.
    """

    def __init__(self, training: TrainingState) -> None:
        self._training = training
        self._past: deque[_Past] = deque(maxlen=_NUM_TREND)

    def examine(
        self, outcome: StepOutcome, *, step: int, epoch: int, batch: int
    ) -> Diagnosis | None:
        """Look at a step that was taken; `batch` counts from 1 in its epoch."""
        self._past.append(_Past(step, epoch, batch, outcome.without_tensors()))
        if not outcome.is_finite:
            symptom = symptom_of(outcome)
            is_gradient = symptom is Symptom.NON_FINITE_GRADIENT
            return self._diagnosis(
                symptom, first_bad_gradient(self._training) if is_gradient else ""
            )
        if step % INTERVAL == 0 or not are_finite(self._training.learning):
            return self.examine_state()
        return None

    def examine_state(self) -> Diagnosis | None:
        """Look at what the steps so far made of the model."""
        if not self._past or is_finite(self._training):
            return None
        symptom, entry = symptom_of_state(self._training)
        return self._diagnosis(symptom, entry)

    def _diagnosis(self, symptom: Symptom, tensor: str | None) -> Diagnosis:
        bad = self._past[-1]
        return Diagnosis(
            symptom=symptom,
            cause=Cause.UNKNOWN,
            step=bad.step,
            noticed_at_step=bad.step,
            epoch=bad.epoch,
            batch=bad.batch,
            batch_size=bad.outcome.batch_size,
            lr=bad.outcome.lr,
            origin=Origin(phase=PHASES.get(symptom, StepPhase.FORWARD), tensor=tensor or ""),
            trend=tuple(trend_point(recorded.step, recorded.outcome) for recorded in self._past),
        )


def trend_point(step: int, outcome: StepOutcome) -> TrendPoint:
    """Return the numbers of a step that a report shows."""
    return TrendPoint(
        step=step,
        loss=outcome.loss,
        grad_norm=math.nan if outcome.grad_norm is None else outcome.grad_norm,
        largest_weight=math.nan,
        lr=outcome.lr,
    )
