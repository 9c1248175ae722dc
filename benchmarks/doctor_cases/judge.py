"""Judges a case: the doctor's diagnoses beside those expected, and how the training ended."""

import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.doctor_cases.cases import TOLERANCE, Case, Healthy, Outcome
from benchmarks.doctor_cases.plain import (
    final_score,
    halve_the_rate,
    is_finite,
    skip_the_batch,
    train_plainly,
)
from benchmarks.doctor_cases.training import Training
from fedrounds.diagnosis.values import Cause, Diagnosis, SuspectSample
from fedrounds.doctor import Doctor, DoctorSettings, TrainingHalted

_WITH_SAMPLES = frozenset({Cause.BAD_DATA, Cause.BAD_LABEL})
_NO_CLAIM = frozenset({Cause.UNKNOWN, Cause.NOT_REPRODUCIBLE})


@dataclass(frozen=True, kw_only=True)
class Treated:
    """A training under the doctor. `error` is an error that got past the doctor."""

    diagnoses: tuple[Diagnosis, ...]
    is_halted: bool
    is_finite: bool
    score: float
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A planted case judged; None is what the case doesn't judge.

    `wrong` says what was expected and what came. `in_steps` is how long each diagnosis took in
    steps of the healthy twin. `halved` and `skipped` are whether the baselines end at the twin's
    score, where a cure is expected.
    """

    case: Case
    treated: Treated
    twin_score: float
    is_detected: bool
    is_cause_right: bool
    is_phase_right: bool | None
    is_module_right: bool | None
    is_step_right: bool | None
    are_samples_right: bool | None
    is_end_right: bool
    in_steps: tuple[tuple[Cause, float], ...]
    halved: bool | None
    skipped: bool | None
    wrong: tuple[str, ...]
    took_s: float


@dataclass(frozen=True, kw_only=True)
class HealthyJudgement:
    """A healthy run judged: the alarms, and whether the weights are those of a plain loop."""

    run: Healthy
    treated: Treated
    is_unchanged: bool
    wrong: tuple[str, ...]
    took_s: float


def treat(training: Training) -> Treated:
    """Train under the doctor's eyes to the end, or to where it stops."""
    task = training.task
    is_halted, error = False, ""
    doctor = Doctor(
        training.model,
        training.optimizer,
        task.loss,
        scheduler=training.scheduler,
        settings=DoctorSettings(),
        clip_norm=task.clip_norm,
        num_classes=task.num_classes,
        is_initial=task.is_initial,
        fresh_state=task.fresh_state,
    )
    try:
        for epoch in range(1, task.epochs + 1):
            for given in training.epoch(epoch):
                doctor.step(given.batch, indices=given.indices, epoch=epoch)
        doctor.finish()
    except TrainingHalted:
        is_halted = True
    # Whatever gets past the doctor is a finding about it, and the other cases are still to come.
    except Exception as raised:
        at = traceback.extract_tb(raised.__traceback__)[-1]
        error = f"{type(raised).__name__}: {raised} ({Path(at.filename).name}:{at.lineno})"
    return Treated(
        diagnoses=tuple(doctor.diagnoses),
        is_halted=is_halted,
        is_finite=is_finite(training.model),
        score=0.0 if is_halted or error else final_score(training),
        error=error,
    )


def judge(case: Case, *, with_baselines: bool) -> Judgement:
    """Run a planted case, its twin and the baselines."""
    began = time.perf_counter()
    twin = train_plainly(case.begin_twin())
    treated = treat(case.begin())
    halved = skipped = None
    if with_baselines and case.expected.outcome is Outcome.CURED:
        least = twin.score - TOLERANCE
        halved = halve_the_rate(case.begin()).score >= least
        skipped = skip_the_batch(case.begin()).score >= least
    expected, wrong = case.expected, list[str]()
    if treated.error:
        wrong.append(f"the doctor raised {treated.error[:200]}")
    first = treated.diagnoses[0] if treated.diagnoses else None
    if first is None:
        wrong.append("nothing was detected")
    # A later diagnosis that claims nothing isn't wrong.
    later = {diagnosis.cause for diagnosis in treated.diagnoses[1:]} - _NO_CLAIM
    is_cause_right = first is not None and {first.cause} | later <= expected.causes
    if first is not None and not is_cause_right:
        wrong.append(f"cause: expected {_list(expected.causes)}, found {_causes(treated)}")
    is_phase_right = is_module_right = is_step_right = None
    if expected.phases:
        is_phase_right = first is not None and first.origin.phase in expected.phases
        if first is not None and not is_phase_right:
            wrong.append(f"phase: expected {_list(expected.phases)}, found {first.origin.phase}")
    if expected.modules:
        is_module_right = first is not None and first.origin.module in expected.modules
        if first is not None and not is_module_right:
            wrong.append(
                f"module: expected {_list(expected.modules)}, found {first.origin.module!r}"
            )
    if expected.step is not None:
        is_step_right = first is not None and first.step == expected.step
        if first is not None and not is_step_right:
            wrong.append(f"step: expected {expected.step}, found {first.step}")
    are_samples_right = _judge_samples(case, first, wrong)
    is_end_right = _judge_end(case, treated, twin.score, wrong)
    return Judgement(
        case=case,
        treated=treated,
        twin_score=twin.score,
        is_detected=first is not None,
        is_cause_right=is_cause_right,
        is_phase_right=is_phase_right,
        is_module_right=is_module_right,
        is_step_right=is_step_right,
        are_samples_right=are_samples_right,
        is_end_right=is_end_right,
        in_steps=tuple(
            (diagnosis.cause, diagnosis.seconds / twin.median_step_s)
            for diagnosis in treated.diagnoses
        ),
        halved=halved,
        skipped=skipped,
        wrong=tuple(wrong),
        took_s=time.perf_counter() - began,
    )


def _judge_samples(case: Case, first: Diagnosis | None, wrong: list[str]) -> bool | None:
    expected = case.expected
    if expected.positions is None:
        return None
    if first is None:
        return False
    if first.cause not in _WITH_SAMPLES:
        # Where another name is right too, it needn't name samples.
        return None if first.cause in expected.causes else False
    positions = {sample.position for sample in first.samples}
    indices = {sample.index for sample in first.samples}
    num_more = int(expected.may_add_one)
    is_right = _is_set(positions, expected.positions, num_more)
    if expected.indices is not None:
        is_right = is_right and _is_set(indices, expected.indices, num_more)
    if not is_right:
        wrong.append(
            f"samples: expected positions {sorted(expected.positions)}, found "
            f"{sorted(positions)} ({_oddities(first.samples)}), indices {sorted(indices)}"
        )
    return is_right


def _is_set(named: set[int], bad: frozenset[int], num_more: int) -> bool:
    return bad <= named and len(named) <= len(bad) + num_more


def _judge_end(case: Case, treated: Treated, twin_score: float, wrong: list[str]) -> bool:
    outcome = case.expected.outcome
    went_on = not treated.is_halted and not treated.error
    if went_on and not treated.is_finite:
        wrong.append("end: it went on with a model that isn't finite")
        return False
    if outcome is Outcome.EITHER:
        return not treated.error
    if outcome is Outcome.HALTED:
        if went_on:
            wrong.append(f"end: expected a halt, but it went on to {treated.score:.4f}")
        return treated.is_halted
    if not went_on:
        if treated.is_halted and outcome is Outcome.CURED_OR_HALTED:
            return True
        if treated.is_halted:
            wrong.append(f"end: expected a cure, but it halted ({_causes(treated)})")
        return False
    is_right = treated.score >= twin_score - TOLERANCE
    if not is_right:
        wrong.append(f"end: scores {treated.score:.4f} beside the twin's {twin_score:.4f}")
    return is_right


def judge_healthy(run: Healthy) -> HealthyJudgement:
    """Run a healthy training under the doctor and in a plain loop."""
    began = time.perf_counter()
    # Each begins anew, for its random numbers come from the global generator.
    bare = run.begin()
    train_plainly(bare)
    watched = run.begin()
    treated = treat(watched)
    wrong = []
    if treated.error:
        wrong.append(f"the doctor raised {treated.error[:200]}")
    if treated.diagnoses:
        alarms = ", ".join(
            f"{diagnosis.symptom} as {diagnosis.cause} at step {diagnosis.step}"
            for diagnosis in treated.diagnoses
        )
        wrong.append(f"false alarm: {alarms}")
    watched_state = watched.model.state_dict()
    is_unchanged = all(
        torch.equal(entry, watched_state[key]) for key, entry in bare.model.state_dict().items()
    )
    if not is_unchanged and not treated.diagnoses:
        wrong.append("the weights aren't those of a plain loop")
    return HealthyJudgement(
        run=run,
        treated=treated,
        is_unchanged=is_unchanged,
        wrong=tuple(wrong),
        took_s=time.perf_counter() - began,
    )


def _causes(treated: Treated) -> str:
    return ", ".join(
        f"{diagnosis.symptom} -> {diagnosis.cause} at step {diagnosis.step} "
        f"(noticed {diagnosis.noticed_at_step}), "
        f"{diagnosis.remedy.kind}{'' if diagnosis.remedy.is_working else ' not working'}"
        for diagnosis in treated.diagnoses
    )


def _oddities(samples: tuple[SuspectSample, ...]) -> str:
    return ", ".join(sorted({str(sample.oddity) for sample in samples}))


def _list(values: frozenset[str] | frozenset[Cause]) -> str:
    return " or ".join(sorted(f"{value!s}" or "''" for value in values))
