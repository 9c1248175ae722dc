"""The doctor's judge: it knows every cause, and can tell a case that isn't what it says."""

from dataclasses import replace

from benchmarks.doctor_cases.cases import Case
from benchmarks.doctor_cases.examination import complaints, objections
from benchmarks.doctor_cases.healthy import healthy_runs
from benchmarks.doctor_cases.planted import planted_cases
from benchmarks.doctor_cases.training import Fault
from fedrounds.diagnosis.values import Cause


def named(part: str) -> Case:
    """Return the planted case of a name."""
    (case,) = (case for case in planted_cases() if case.name == part)
    return case


def test_every_cause_is_planted_over_many_architectures() -> None:
    """The judge asks for what issue 5 asks for."""
    planted = planted_cases()
    assert {cause for case in planted for cause in case.expected.causes} == set(Cause)
    assert len({case.task.architecture for case in planted}) >= 5
    assert len(planted) >= 60
    assert len(healthy_runs()) >= 60


def test_a_case_without_its_fault_is_found_out() -> None:
    """The examination passes a planted fault, and objects where nothing is planted."""
    case = named("norm mlp nan in a row")
    assert objections(case)[0] == []
    harmless = replace(case, fault=Fault())
    assert any("no harm is done" in objection for objection in objections(harmless)[0])


def test_a_fault_planted_elsewhere_is_found_out() -> None:
    """A case names the step in which its fault strikes."""
    case = named("norm mlp nan in a row")
    elsewhere = replace(case, expected=replace(case.expected, step=30))
    assert any("expected at step 30" in objection for objection in objections(elsewhere)[0])


def test_a_run_that_is_not_healthy_is_found_out() -> None:
    """The examination passes a healthy run, and not the same with a fault in it."""
    (run,) = (run for run in healthy_runs() if run.name == "norm mlp sgd at 1")
    assert complaints(run)[0] == []
    spoiled = replace(run, task=run.task, fault=named("norm mlp nan in a row").fault)
    assert complaints(spoiled)[0] != []
