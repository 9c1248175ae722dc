"""A diagnosis on the wire, in the store and in words."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from fedrounds.diagnosis.as_json import diagnosis_fields, read_diagnosis
from fedrounds.diagnosis.text import experiment_rows, facts, is_cured, trend_rows, verdict
from fedrounds.diagnosis.values import (
    MAX_DIMENSIONS,
    MAX_EXPERIMENTS,
    MAX_SAMPLES,
    MAX_TREND,
    Cause,
    Diagnosis,
    ExperimentName,
    Oddity,
    Remedy,
    RemedyKind,
    StepPhase,
    Symptom,
)
from fedrounds.errors import InvalidInput
from fedrounds.wire.diagnosis import diagnosis_message, diagnosis_of
from fedrounds.wire.pb import federation_pb2 as pb
from tests.factories import make_diagnosis


def over_the_wire(diagnosis: Diagnosis) -> Diagnosis:
    """Return what the other side reads."""
    sent = diagnosis_message(diagnosis).SerializeToString()
    return diagnosis_of(pb.Diagnosis.FromString(sent))


def through_the_store(diagnosis: Diagnosis) -> Diagnosis:
    """Return what is read back from an incident's fields, as JSON proper."""
    return read_diagnosis(json.loads(json.dumps(diagnosis_fields(diagnosis), allow_nan=False)))


WAYS = pytest.mark.parametrize("way", [over_the_wire, through_the_store])


def comparable(diagnosis: Diagnosis) -> str:
    """Return all of it as text, in which a NaN equals another."""
    return repr(asdict(diagnosis))


@WAYS
def test_a_diagnosis_comes_back_as_it_was(way: Callable[[Diagnosis], Diagnosis]) -> None:
    """Every field, NaN and infinities included, and the same without samples."""
    whole = make_diagnosis()
    defaults = {field.name: field.default for field in fields(Diagnosis)}
    unset = [name for name, value in defaults.items() if getattr(whole, name) == value]
    assert unset == [], "the example leaves these out, so this test wouldn't see them lost"
    for diagnosis in (whole, whole.without_samples()):
        assert comparable(way(diagnosis)) == comparable(diagnosis)


@WAYS
def test_every_name_has_a_place(way: Callable[[Diagnosis], Diagnosis]) -> None:
    """All members of all enums, each once."""
    for symptom in Symptom:
        assert way(make_diagnosis(symptom=symptom)).symptom is symptom
    for cause in Cause:
        assert way(make_diagnosis(cause=cause)).cause is cause
    for phase in StepPhase:
        origin = replace(make_diagnosis().origin, phase=phase)
        assert way(make_diagnosis(origin=origin)).origin.phase is phase
    for kind in RemedyKind:
        for oddity in Oddity:
            remedy = Remedy(kind=kind, oddity=oddity)
            assert way(make_diagnosis(remedy=remedy)).remedy == remedy
    names = tuple(ExperimentName)
    assert way(make_diagnosis(contributing=names)).contributing == names


def with_too_many(name: str, count: int) -> pb.Diagnosis:
    """Return a message with `count` of something."""
    message = diagnosis_message(make_diagnosis())
    holder = message.origin if name in ("shape", "first_index") else message
    repeated = getattr(holder, name)
    repeated.extend([repeated[0]] * (count - len(repeated)))
    return message


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("samples", MAX_SAMPLES),
        ("experiments", MAX_EXPERIMENTS),
        ("contributing", MAX_EXPERIMENTS),
        ("trend", MAX_TREND),
        ("shape", MAX_DIMENSIONS),
        ("first_index", MAX_DIMENSIONS),
    ],
)
def test_there_is_no_more_of_anything_than_may_be(name: str, most: int) -> None:
    """As much as may be is taken, one more is not."""
    diagnosis_of(with_too_many(name, most))
    with pytest.raises(
        InvalidInput, match=f"{name} has {most + 1} values; it must have from 0 to {most}"
    ):
        diagnosis_of(with_too_many(name, most + 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"symptom": 99}, "Symptom 99"),
        ({"cause": 0}, "Cause 0"),
        ({"contributing": [99]}, "ExperimentName 99"),
        ({"origin": {"phase": 1, "operation": "Anna's scan"}}, "no operation of torch"),
        ({"origin": {"phase": 1, "operation": "a" * 65}}, "no operation of torch"),
        ({"origin": {"phase": 1, "dtype": "the 3rd\n"}}, "no dtype of torch"),
        ({"origin": {}}, "StepPhase 0"),
        ({"remedy": {}}, "RemedyKind 0"),
        ({"detail": {"patient_17": 1.0}}, "isn't declared"),
    ],
    ids=str,
)
def test_only_declared_names_are_taken(changes: dict[str, Any], words: str) -> None:
    """What is neither an enum's number nor a declared name is refused, and not repeated."""
    message = diagnosis_message(make_diagnosis())
    clear: Any = message.ClearField
    for name in changes:
        clear(name)
    message.MergeFrom(pb.Diagnosis(**changes))
    with pytest.raises(InvalidInput, match=words) as caught:
        diagnosis_of(message)
    assert "Anna" not in str(caught.value)
    assert "patient" not in str(caught.value)


@pytest.mark.parametrize("name", ["john_smith_has_hiv", "nms", "name", "__class__"])
def test_an_operation_or_dtype_that_torch_does_not_have_is_neither_sent_nor_kept(
    name: str,
) -> None:
    """Any text could be such a name; the rest of the diagnosis counts."""
    origin = replace(make_diagnosis().origin, operation=name, dtype="patient_0815")
    blank = make_diagnosis(origin=replace(origin, operation="", dtype=""))
    message = diagnosis_message(make_diagnosis(origin=origin))
    assert (message.origin.operation, message.origin.dtype) == ("", "")
    message.origin.operation, message.origin.dtype = name, "patient_0815"
    assert comparable(diagnosis_of(message)) == comparable(blank)


@pytest.mark.parametrize(
    "name", ["log", "log_", "_log_softmax_backward_data", "native_batch_norm", "__or__", "linear"]
)
def test_the_operations_of_torch_are_kept(name: str) -> None:
    """Those with an underscore too, and those that work in place."""
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        origin = replace(make_diagnosis().origin, operation=name, dtype=dtype)
        assert over_the_wire(make_diagnosis(origin=origin)).origin == origin


def test_the_verdict_is_a_sentence() -> None:
    """What, when, the evidence, and what was done: cured, in vain, or not at all."""
    cured = make_diagnosis()
    assert verdict(cured) == (
        "bad-data at step 17 (2 samples with NaN in the input): dropped, training went on"
    )
    # Without samples the remedy still says what was odd.
    assert verdict(cured.without_samples()) == verdict(cured)
    lowered = make_diagnosis(
        symptom=Symptom.NON_FINITE_GRADIENT,
        cause=Cause.LEARNING_RATE,
        remedy=Remedy(kind=RemedyKind.LOWER_RATE, value=0.1),
    )
    assert verdict(lowered) == (
        "learning-rate at step 17 (a gradient isn't finite from native_batch_norm in 1.weight): "
        "rate times 0.1 in vain"
    )
    stopped = make_diagnosis(cause=Cause.UNKNOWN, remedy=Remedy(kind=RemedyKind.NONE))
    assert verdict(stopped) == (
        "unknown at step 17 (the loss isn't finite; no experiment healed it): "
        "training stopped, no update"
    )
    assert [is_cured(diagnosis) for diagnosis in (cured, lowered, stopped)] == [True, False, False]


def test_every_name_has_words() -> None:
    """No combination of names is without a sentence, and none shows a number that isn't one."""
    for cause in Cause:
        for symptom in Symptom:
            for kind in RemedyKind:
                remedy = Remedy(kind=kind, is_working=True)
                sentence = verdict(make_diagnosis(cause=cause, symptom=symptom, remedy=remedy))
                assert sentence.startswith(f"{cause} at step 17 (")
    every = make_diagnosis(contributing=tuple(ExperimentName))
    assert len(dict(facts(every))["heals it too"].split(", ")) == len(ExperimentName)


def test_the_tables_hold_the_evidence() -> None:
    """A row for each experiment and each step, with its numbers."""
    shown = make_diagnosis()
    assert list(experiment_rows(shown)) == [
        ("unchanged", "", "fails at step 17", "nan"),
        ("without the suspects", "", "goes well", "0.75"),
        ("rate times", "0.5", "goes well", "0.5"),
    ]
    assert [row[:3] for row in trend_rows(shown)] == [
        ("16", "0.5", "1.5"),
        ("17  bad", "nan", "inf"),
    ]
    known = dict(facts(shown))
    assert known["where"] == (
        "forward pass, module 1, operation native_batch_norm, tensor 1.weight: 4 NaN and 2 "
        f"infinite of {math.prod((8, 16))} numbers (float32), the first at [0, 3]"
    )
    assert known["samples"] == ("number 40 (NaN in the input, 3); position 7 (NaN in the input, 1)")
    assert dict(facts(shown.without_samples()))["samples"] == "2, which ones isn't told"
