"""The limits of the messages' fields: those that the protocol's comments state, and no others."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from fedrounds.errors import InvalidInput
from fedrounds.types import MAX_INT32
from fedrounds.wire.diagnosis import diagnosis_message
from fedrounds.wire.limits import LIMITS, MAX_COUNT, MAX_INT64, Limit, validate_limits
from fedrounds.wire.pb import federation_pb2 as pb
from tests.factories import make_diagnosis

PROTOCOL = Path(__file__).parents[3] / "protos/fed/v1/federation.proto"
LARGEST = math.nextafter(math.inf, 0)
UNSIGNED = (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_UINT32)
REQUESTS = [
    method.input_type for method in pb.DESCRIPTOR.services_by_name["FederationService"].methods
]


def comments() -> dict[str, str]:
    """Return the comment above each field of the protocol, as one line, by "Message.field"."""
    known, message, lines = {}, "", list[str]()
    for line in PROTOCOL.read_text().splitlines():
        if opened := re.match(r"message (\w+) {", line):
            message = opened[1]
        elif comment := re.match(r"\s*// ?(.*)", line):
            lines.append(comment[1])
            continue
        elif field := re.match(r"\s+(?:optional |repeated )?[\w.<>, ]+ (\w+) = \d+;", line):
            known[f"{message}.{field[1]}"] = " ".join(lines)
        lines = []
    return known


def fields_of(*roots: Descriptor) -> Iterator[FieldDescriptor]:
    """Yield all fields of our messages within these, once each."""
    seen, waiting = set[str](), list(roots)
    while waiting:
        descriptor = waiting.pop()
        if descriptor.full_name in seen or not descriptor.full_name.startswith("fed.v1."):
            continue
        seen.add(descriptor.full_name)
        for field in descriptor.fields:
            if field.message_type is not None:
                waiting.append(field.message_type)
            if not descriptor.GetOptions().map_entry:
                yield field


def name_of(field: FieldDescriptor) -> str:
    """Return "Message.field"."""
    assert field.containing_type is not None
    return f"{field.containing_type.name}.{field.name}"


def in_words(number: float) -> str:
    """Return a number as the protocol's comments write it."""
    powers = {MAX_COUNT: "2^53", MAX_INT32: "2^31 - 1", MAX_INT64: "2^63 - 1"}
    return powers.get(int(number), f"{number:,}") if number < LARGEST else ""


def words_of(field: FieldDescriptor, limit: Limit, *, of_each: bool = False) -> str:
    """Return how a comment states the limit of a field, or of each value of a repeated field."""
    least, most = in_words(limit.least), in_words(limit.most)
    is_number = field.cpp_type not in (
        FieldDescriptor.CPPTYPE_STRING,
        FieldDescriptor.CPPTYPE_MESSAGE,
    )
    if limit.most == LARGEST:
        return f"Finite, from {least}."
    if of_each:
        return f"each from {least} to {most}" if is_number else f"each of at most {most} characters"
    if is_number and not field.is_repeated and field.type not in UNSIGNED:
        return f"From {least} to {most}."
    unit = " characters" if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else ""
    unit = "" if field.is_repeated else unit
    return f"At most {most}{unit}" if limit.least == 0 else f"From {least} to {most}{unit}"


def test_the_protocols_comments_state_every_limit_of_the_table() -> None:
    """Each in the same words, so that a limit can't be changed in one of the two places alone."""
    known = comments()
    by_name = {name_of(field): field for field in fields_of(*REQUESTS)}
    limits = {
        key: limit
        for key, limit in LIMITS.items()
        if not key.startswith(("Duration.", "Timestamp."))
    }
    missing = {}
    for key, limit in limits.items():
        name = key.removesuffix("[]")
        words = words_of(by_name[name], limit, of_each=key.endswith("[]"))
        if words not in known[name]:
            missing[key] = words
    assert missing == {}


def test_every_number_of_a_request_has_a_limit_or_says_why_not() -> None:
    """Any number is good, or what it must be depends on the run, or it only ever grows."""
    known = comments()
    numbers = (
        *(FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64),
        *(FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_DOUBLE),
    )
    unlimited = [
        name_of(field)
        for field in fields_of(*REQUESTS)
        if field.cpp_type in numbers
        and not {name_of(field), f"{name_of(field)}[]"} & LIMITS.keys()
        and not re.search("[Aa]ny number|REFUSED|--max-num-examples", known[name_of(field)])
    ]
    assert sorted(unlimited) == [
        *("Counters.batches", "Counters.batches_total", "Counters.bytes_received"),
        *("Counters.bytes_sent", "Counters.evaluation_batches"),
        *("Counters.evaluation_batches_total", "Counters.replays"),
        # Their values are compared with the bytes that there are.
        *("DownloadBlobRequest.offset", "Section.size_bytes"),
        # As the comment above each of them says.
        *("TrendPoint.grad_norm", "TrendPoint.largest_weight", "UploadHeader.offset"),
    ]


def whole_report() -> pb.ReportProgressRequest:
    """Return a report with something in every field."""
    report = pb.ReportProgressRequest()
    incident = report.incidents.add(
        sequence=1,
        kind=pb.INCIDENT_KIND_TRAINING_DIAGNOSED,
        step=17,
        epoch=2,
        diagnosis=diagnosis_message(make_diagnosis()),
    )
    incident.at.GetCurrentTime()
    return report


def set_in(message: Message, key: str, value: float) -> bool:
    """Set field "Message.field" of a message or an inner message; return whether it is in it."""
    owner, _, name = key.removesuffix("[]").partition(".")
    if message.DESCRIPTOR.name == owner:
        if message.DESCRIPTOR.fields_by_name[name].is_repeated:
            getattr(message, name)[0] = value
        else:
            setattr(message, name, value)
        return True
    return any(
        set_in(child, key, value)
        for field, inner in message.ListFields()
        if field.message_type is not None and not field.message_type.GetOptions().map_entry
        for child in (inner if field.is_repeated else (inner,))
    )


NUMBERS = [
    key
    for field in fields_of(pb.ReportProgressRequest.DESCRIPTOR)
    for key in (name_of(field) + "[]" * field.is_repeated,)
    if key in LIMITS
]
"""The limits of numbers that a report holds, not those of how many there are."""


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_taken_up_to_its_limit_and_refused_beyond(key: str) -> None:
    """Of a report with a diagnosis: the two ends of each limit, one further, NaN and infinity."""
    limit = LIMITS[key]
    is_whole = isinstance(limit.most, int)
    beyond = [limit.least - 1] + ([limit.most + 1] if is_whole else [math.inf, math.nan])
    for value in (limit.least, limit.most):
        report = whole_report()
        assert set_in(report, key, value)
        validate_limits(report)
    for value in beyond:
        report = whole_report()
        try:
            assert set_in(report, key, value)
        except ValueError:
            # The field's type can't hold it.
            continue
        with pytest.raises(InvalidInput, match=re.escape(f"{key.removesuffix('[]')} is {value}")):
            validate_limits(report)


@pytest.mark.parametrize("seconds", [2**62, -(2**62), 315_576_000_001])
def test_a_duration_outside_of_its_definition_is_refused(seconds: int) -> None:
    """Wherever it is in a message, with a sentence."""
    request = pb.PullWorkRequest(wait=Duration(seconds=seconds))
    with pytest.raises(InvalidInput, match=f"Duration.seconds is {seconds}; it must be from"):
        validate_limits(request)
    with pytest.raises(InvalidInput, match=r"Timestamp\.seconds"):
        validate_limits(pb.Incident(sequence=1, at=Timestamp(seconds=2**62)))
