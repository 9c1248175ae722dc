"""Judges a case in one seed: the diagnosis beside the truth, and what became of the model."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.unseen_doctor_cases.case import HealthyCase, PlantedCase, Training
from benchmarks.unseen_doctor_cases.harness import Outcome, are_same, run_doctored, run_plain
from fedrounds.diagnosis.text import verdict
from fedrounds.diagnosis.values import Diagnosis

TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class PlantedResult:
    """A planted case in one seed; None where the truth claims nothing.

    `is_as_planted` is whether the plain loop shows the fault that the case says it has: values that
    aren't finite, or a finite metric below the healthy twin's.
    """

    name: str
    seed: int
    untreated: float
    skipped: float
    doctored: float
    twin: float
    is_as_planted: bool
    is_detected: bool
    is_cause_right: bool
    is_phase_right: bool | None
    is_module_right: bool | None
    are_samples_exact: bool | None
    is_crashed: bool
    is_halted: bool
    seconds: float
    step_seconds: float
    words: str

    @property
    def holds_bound(self) -> bool:
        """Whether the doctor's final metric is no worse than the better of both plain loops."""
        return self.doctored >= max(self.untreated, self.skipped) - TOLERANCE

    @property
    def is_near_twin(self) -> bool:
        """Whether the doctor's final metric is that of the healthy twin."""
        return self.doctored >= self.twin - TOLERANCE


@dataclass(frozen=True, kw_only=True)
class HealthyResult:
    """A healthy case in one seed."""

    name: str
    seed: int
    plain: float
    doctored: float
    is_changed: bool
    is_crashed: bool
    num_diagnoses: int
    slowdown: float
    words: str


def judge_planted(case: PlantedCase, *, seed: int) -> PlantedResult:
    """Run a planted case four times and return what is right."""
    untreated = run_plain(begin(lambda: case.build(seed, fault=True), seed=seed))
    skipped = run_plain(begin(lambda: case.build(seed, fault=True), seed=seed), skips=True)
    twin = run_plain(begin(lambda: case.build(seed, fault=False), seed=seed))
    training = begin(lambda: case.build(seed, fault=True), seed=seed)
    doctored = run_doctored(training)
    truth = case.truth
    first = doctored.diagnoses[0] if doctored.diagnoses else None
    broke = bool(untreated.error) or untreated.num_non_finite > 0 or not _is_whole(untreated)
    is_worse = untreated.score < twin.score - 2 * TOLERANCE
    return PlantedResult(
        name=case.name,
        seed=seed,
        untreated=untreated.score,
        skipped=skipped.score,
        doctored=doctored.score,
        twin=twin.score,
        is_as_planted=broke if truth.becomes_non_finite else (is_worse and not broke),
        is_detected=first is not None or doctored.is_halted,
        is_cause_right=first is not None and first.cause in truth.causes,
        is_phase_right=(
            (first is not None and first.origin.phase in truth.phases) if truth.phases else None
        ),
        is_module_right=(
            (first is not None and first.origin.module in truth.modules) if truth.modules else None
        ),
        are_samples_exact=_are_exact(training, first),
        is_crashed=_is_own_error(doctored, untreated),
        is_halted=doctored.is_halted,
        seconds=sum(diagnosis.seconds for diagnosis in doctored.diagnoses),
        step_seconds=twin.seconds / len(training.steps),
        words=_words(doctored),
    )


def judge_healthy(case: HealthyCase, *, seed: int) -> HealthyResult:
    """Run a healthy case with and without the doctor and return whether it was left alone."""
    plain = run_plain(begin(lambda: case.build(seed), seed=seed))
    doctored = run_doctored(begin(lambda: case.build(seed), seed=seed))
    return HealthyResult(
        name=case.name,
        seed=seed,
        plain=plain.score,
        doctored=doctored.score,
        is_changed=not are_same(plain.state, doctored.state),
        is_crashed=_is_own_error(doctored, plain),
        num_diagnoses=len(doctored.diagnoses),
        slowdown=doctored.seconds / plain.seconds,
        words=_words(doctored),
    )


def bound_holds_on_average(results: list[PlantedResult]) -> bool:
    """Whether the bound holds for the means over the seeds."""
    doctored = statistics.fmean(result.doctored for result in results)
    untreated = statistics.fmean(result.untreated for result in results)
    skipped = statistics.fmean(result.skipped for result in results)
    return doctored >= max(untreated, skipped) - TOLERANCE


def begin(build: Callable[[], Training], *, seed: int) -> Training:
    """Return a training built after torch was seeded."""
    torch.manual_seed(seed)
    return build()


def _is_whole(outcome: Outcome) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in outcome.state.values())


def _is_own_error(doctored: Outcome, plain: Outcome) -> bool:
    """Whether an error isn't the one that the plain loop ends with, too."""
    return bool(doctored.error) and doctored.error != plain.error


def _are_exact(training: Training, first: Diagnosis | None) -> bool | None:
    """Whether the named samples are those at fault in the batch that went wrong."""
    if training.bad_samples is None:
        return None
    if first is None:
        return False
    batch = {int(number) for number in training.steps[first.step - 1].indices}
    return {sample.index for sample in first.samples} == batch & training.bad_samples


def _words(doctored: Outcome) -> str:
    words = [
        f"{verdict(diagnosis)} [{diagnosis.origin.phase}:{diagnosis.origin.module}"
        f":{diagnosis.origin.operation}]"
        for diagnosis in doctored.diagnoses
    ]
    if doctored.error:
        words.append(f"raised {doctored.error[:120]}")
    return "; ".join(words) or "nothing"
