"""A client's diagnosis: taken with its evidence, refused with any name the task doesn't declare."""

import json
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import grpc
import pytest

from fedrounds.diagnosis.as_json import read_diagnosis
from fedrounds.diagnosis.text import verdict
from fedrounds.diagnosis.values import Diagnosis, Remedy, RemedyKind
from fedrounds.wire.diagnosis import diagnosis_message
from fedrounds.wire.pb import federation_pb2 as pb
from tests.factories import make_diagnosis
from tests.integration.conftest import History
from tests.integration.peer import OpenRound, entry_of, expect_status


def incident_of(diagnosis: Diagnosis, *, sequence: int = 1) -> pb.Incident:
    """Return what a client sends of a diagnosis."""
    return pb.Incident(
        sequence=sequence,
        kind=pb.INCIDENT_KIND_TRAINING_DIAGNOSED,
        step=diagnosis.step,
        epoch=diagnosis.epoch,
        diagnosis=diagnosis_message(diagnosis),
    )


def test_diagnoses_are_kept_whole_and_training_goes_on(opened: OpenRound, history: History) -> None:
    """Several of one order, each once however often it is sent; the update counts as any other."""
    peer, order = opened.peers[0], opened.orders[0]
    first = make_diagnosis()
    # What the client's policy keeps to itself isn't there.
    second = make_diagnosis(step=29).without_samples()
    for _ in range(2):
        incidents = [incident_of(first), incident_of(second, sequence=2)]
        assert peer.report(order, incidents=incidents) == pb.DIRECTIVE_CONTINUE
    assert opened.settle(0) == [pb.RECEIPT_STORED]
    kept = entry_of(history(), order)["incidents"]
    json.dumps(kept, allow_nan=False)
    assert [(incident["kind"], incident["client"], incident["step"]) for incident in kept] == [
        ("training-diagnosed", 0, 17),
        ("training-diagnosed", 0, 29),
    ]
    assert repr(asdict(read_diagnosis(kept[0]))) == repr(asdict(first))
    assert read_diagnosis(kept[1]).samples == ()
    assert [incident["verdict"] for incident in kept] == [verdict(first), verdict(second)]


def test_the_modules_and_entries_of_the_tasks_model_may_be_named(
    opened: OpenRound, history: History
) -> None:
    """The model itself, a module without any weights, a buffer."""
    origin = make_diagnosis().origin
    names = [("", ""), ("2", ""), ("1", "1.running_mean")]
    incidents = [
        incident_of(
            make_diagnosis(origin=replace(origin, module=module, tensor=tensor)), sequence=number
        )
        for number, (module, tensor) in enumerate(names, start=1)
    ]
    opened.peers[0].report(opened.orders[0], incidents=incidents)
    kept = entry_of(history(), opened.orders[0])["incidents"]
    origins = [read_diagnosis(incident).origin for incident in kept]
    assert [(origin.module, origin.tensor) for origin in origins] == names


def test_more_incidents_than_an_order_has_are_refused(opened: OpenRound, history: History) -> None:
    """However they are numbered; none of them is kept."""
    incidents = [pb.Incident(kind=pb.INCIDENT_KIND_TRAINING_FAILED, sequence=1)] * 65
    expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: opened.peers[0].report(opened.orders[0], incidents=incidents),
        match="incidents has 65 values; it must have from 0 to 64",
    )
    assert entry_of(history(), opened.orders[0])["incidents"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"module": "patient 17"}, "module that the model of task"),
        ({"module": "1.weight"}, "module that the model of task"),
        ({"tensor": "patient 17"}, "tensor that isn't in the state_dict"),
        ({"tensor": "1"}, "tensor that isn't in the state_dict"),
        ({"operation": "patient 17"}, "no operation of torch"),
    ],
    ids=str,
)
def test_any_other_name_is_refused_and_nothing_of_the_report_is_kept(
    opened: OpenRound, history: History, changes: dict[str, Any], words: str
) -> None:
    """Also what came before it in the report."""
    bad = incident_of(make_diagnosis(), sequence=2)
    for name, value in changes.items():
        # Set in the message: this side's own translation would leave such an operation out.
        setattr(bad.diagnosis.origin, name, value)
    incidents = [incident_of(make_diagnosis()), bad]
    sentence = expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: opened.peers[0].report(opened.orders[0], incidents=incidents),
        match=words,
    )
    assert "patient" not in sentence
    assert entry_of(history(), opened.orders[0])["incidents"] == []


def test_a_diagnosis_and_its_kind_come_together_and_are_numbered(opened: OpenRound) -> None:
    """Neither without the other, and at most 64 of one order."""
    without = pb.Incident(sequence=1, kind=pb.INCIDENT_KIND_TRAINING_DIAGNOSED)
    other = incident_of(make_diagnosis())
    other.kind = pb.INCIDENT_KIND_TRAINING_FAILED
    for incident in (without, other):
        expect_status(
            grpc.StatusCode.INVALID_ARGUMENT,
            partial(opened.peers[0].report, opened.orders[0], incidents=[incident]),
            match="comes with a diagnosis",
        )
    for sequence in (0, -1, 65):
        incidents = [incident_of(make_diagnosis(), sequence=sequence)]
        expect_status(
            grpc.StatusCode.INVALID_ARGUMENT,
            partial(opened.peers[0].report, opened.orders[0], incidents=incidents),
            match="1 to 64",
        )


def test_a_client_that_stopped_says_why_and_gives_up(opened: OpenRound, history: History) -> None:
    """Its last report holds the diagnosis and ends the order."""
    stopped = make_diagnosis(remedy=Remedy(kind=RemedyKind.NONE))
    peer, order = opened.peers[0], opened.orders[0]
    incidents = [incident_of(stopped)]
    assert peer.report(order, incidents=incidents, gave_up=True) == pb.DIRECTIVE_ABANDON
    entry = entry_of(history(), order)
    assert [order["state"] for order in entry["orders"] if order["client"] == 0] == ["ABANDONED"]
    assert entry["incidents"][0]["verdict"].endswith("training stopped, no update")
    opened.settle(1, 2)
