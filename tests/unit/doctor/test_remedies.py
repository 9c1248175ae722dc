"""What a remedy changes: which steps, which samples, which rate."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import SGD

from fedrounds.diagnosis.values import (
    Cause,
    Experiment,
    ExperimentName,
    Oddity,
    Origin,
    Remedy,
    RemedyKind,
    RemedyPolicy,
    StepPhase,
    SuspectSample,
    Symptom,
)
from fedrounds.doctor.findings import Finding
from fedrounds.doctor.history import RandomState, Recorded, Snapshot
from fedrounds.doctor.remedies import (
    applied,
    candidates_for,
    holds_left_out,
    leaving_out_earlier,
)
from fedrounds.doctor.stepping import UNTREATED, StepOutcome, TrainingState

START = Snapshot(step=4, tensors=[], optimizer_state=[], groups=[], scheduler_state=None)
MODEL = nn.Linear(1, 1)
TRAINING = TrainingState(
    model=MODEL, optimizer=SGD(MODEL.parameters(), lr=1.0), compute_loss=lambda _model, _batch: None
)


def recorded(step: int, indices: Sequence[int], *, is_taken: bool = True) -> Recorded:
    """Return a step on samples whose only input is their number."""
    return Recorded(
        step=step,
        epoch=1,
        batch_number=step,
        batch=(torch.tensor(indices, dtype=torch.float32)[:, None], torch.zeros(len(indices))),
        indices=indices,
        random_state=RandomState(cpu=torch.zeros(1), cuda=None),
        settings=[],
        treatment=UNTREATED,
        outcome=StepOutcome(loss=1.0, is_taken=is_taken),
        num_bytes=0,
    )


def finding(
    cause: Cause,
    *,
    onset: int = 7,
    samples: tuple[SuspectSample, ...] = (),
    max_rate: float = math.inf,
    max_input: float = math.inf,
) -> Finding:
    """Return what an examination came to: harm in step `onset`, and a bad value in step 9."""
    return Finding(
        symptom=Symptom.NON_FINITE_FORWARD,
        cause=cause,
        bad_step=recorded(9, [5, 6]),
        onset=recorded(onset, [5, 6]),
        origin=Origin(phase=StepPhase.FORWARD),
        samples=samples,
        num_samples=len(samples),
        return_to=START,
        max_rate=max_rate,
        max_input=max_input,
    )


@pytest.mark.parametrize(
    ("cause", "expected"), [(Cause.LEARNING_RATE, 7), (Cause.DEGENERATE_BATCH, 9)]
)
def test_of_a_high_rate_the_step_is_skipped_that_did_the_harm(cause: Cause, expected: int) -> None:
    treatment = applied(UNTREATED, Remedy(kind=RemedyKind.SKIP_BATCH), finding(cause))
    assert treatment.skips == {expected}


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_step_is_skipped_for_its_rate_first_only_if_none_was_just_before(is_alone: bool) -> None:
    lower = Experiment(name=ExperimentName.LOWER_RATE, is_healed=True, value=0.1)
    case = replace(finding(Cause.LEARNING_RATE), experiments=(lower,))
    first, second = candidates_for(case, RemedyPolicy.CURE, is_finite=False, is_alone=is_alone)
    assert (first.kind is RemedyKind.SKIP_BATCH) == is_alone
    assert {first.kind, second.kind} == {RemedyKind.SKIP_BATCH, RemedyKind.LOWER_RATE}


def test_a_rate_that_a_schedule_raises_is_bounded_and_others_are_multiplied() -> None:
    lower = Remedy(kind=RemedyKind.LOWER_RATE, value=0.1)
    risen = applied(UNTREATED, lower, finding(Cause.LEARNING_RATE, max_rate=0.02))
    assert [risen.rate(lr, step=100) for lr in (0.01, 0.1, 1e6)] == [0.01, 0.02, 0.02]
    constant = applied(UNTREATED, lower, finding(Cause.LEARNING_RATE))
    assert constant.rate(0.5, step=100) == pytest.approx(0.05)


def test_a_sample_without_an_oddity_is_left_out_wherever_its_number_is() -> None:
    sample = SuspectSample(position=1, index=6, oddity=Oddity.NONE)
    steps = [recorded(1, [6, 2]), recorded(2, [3, 4]), recorded(9, [5, 6])]
    treatment = leaving_out_earlier(UNTREATED, finding(Cause.BAD_DATA, samples=(sample,)), steps)
    assert treatment.without == {(1, 0), (9, 1)}
    assert [holds_left_out(step, treatment, TRAINING) for step in steps] == [True, False, True]


def test_an_odd_sample_is_known_in_earlier_steps_by_its_oddity() -> None:
    """Without numbers in the data set: 50 is beyond the largest input that stays, 10."""
    sample = SuspectSample(position=1, oddity=Oddity.OUTLIER)
    case = finding(Cause.BAD_DATA, samples=(sample,), max_input=10.0)
    remedy = Remedy(kind=RemedyKind.DROP_SAMPLES, oddity=Oddity.OUTLIER, value=10.0)
    treatment = applied(UNTREATED, remedy, case)
    steps = [recorded(1, [50, 2]), recorded(2, [3, 4]), recorded(3, [50], is_taken=False)]
    assert leaving_out_earlier(treatment, case, steps).without == frozenset()
    assert [holds_left_out(step, treatment, TRAINING) for step in steps] == [True, False, False]
