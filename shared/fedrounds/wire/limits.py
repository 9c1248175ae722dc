"""The limits of the messages' fields, stated once, and the check that a message keeps them.

The comments in federation.proto say the same in words; tests/unit/shared/test_limits.py compares
them. What depends on the run (weights, sections, declared names) is examined where the run is
known.
"""

import math
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from fedrounds.diagnosis.values import MAX_DIMENSIONS, MAX_EXPERIMENTS, MAX_SAMPLES, MAX_TREND
from fedrounds.errors import InvalidInput
from fedrounds.types import MAX_CLIENT_ID, MAX_CLIENT_IDS, MAX_INCIDENTS, MAX_INT32, MAX_SUMS

MAX_COUNT = 2**53
"""The largest whole number of those that are kept: up to here JSON numbers are exact."""

MAX_INT64 = 2**63 - 1


@dataclass(frozen=True)
class Limit:
    """The least and the most that a field may be; NaN and infinity are outside of every limit.

    Of a number its value, of a text its characters, of a repeated field how many values there are.
    """

    least: float
    most: float


_COUNT = Limit(0, MAX_COUNT)
_FROM_ONE = Limit(1, MAX_COUNT)
_EPOCH = Limit(1, MAX_INT32)
_FINITE = Limit(0, math.nextafter(math.inf, 0))
_TEXT = Limit(0, 128)
_DIMENSIONS = Limit(0, MAX_DIMENSIONS)

LIMITS = {
    "RegisterRequest.client_ids": Limit(1, MAX_CLIENT_IDS),
    "RegisterRequest.client_ids[]": Limit(0, MAX_CLIENT_ID),
    "RegisterRequest.instance_key": Limit(1, 128),
    "RegisterRequest.software_version": _TEXT,
    "RegisterRequest.task": Limit(0, 4096),
    "RegisterRequest.capabilities": Limit(0, 64),
    "RegisterRequest.capabilities[]": _TEXT,
    "RegisterRequest.process_key": _TEXT,
    "UploadHeader.size_bytes": Limit(0, MAX_INT64),
    "UploadHeader.sections": Limit(0, 8),
    "UploadHeader.measurements": Limit(0, 256),
    "Measurement.name": _TEXT,
    "Measurement.values": Limit(0, MAX_SUMS),
    "ReportProgressRequest.incidents": Limit(0, MAX_INCIDENTS),
    "LeaveRequest.client_ids": Limit(0, MAX_CLIENT_IDS),
    "LeaveRequest.client_ids[]": Limit(0, MAX_CLIENT_ID),
    "LeaveRequest.kept_order_ids": Limit(0, MAX_CLIENT_IDS),
    "Incident.sequence": Limit(1, MAX_INCIDENTS),
    "Incident.step": _FROM_ONE,
    "Incident.epoch": _EPOCH,
    "Diagnosis.step": _FROM_ONE,
    "Diagnosis.noticed_at_step": _FROM_ONE,
    "Diagnosis.epoch": _EPOCH,
    "Diagnosis.batch": _FROM_ONE,
    "Diagnosis.batch_size": _COUNT,
    "Diagnosis.lr": _FINITE,
    "Diagnosis.samples": Limit(0, MAX_SAMPLES),
    "Diagnosis.num_samples": _COUNT,
    "Diagnosis.experiments": Limit(0, MAX_EXPERIMENTS),
    "Diagnosis.contributing": Limit(0, MAX_EXPERIMENTS),
    "Diagnosis.trend": Limit(0, MAX_TREND),
    "Diagnosis.returned_to_step": _COUNT,
    "Diagnosis.num_replayed_steps": _COUNT,
    "Diagnosis.seconds": _FINITE,
    "Origin.shape": _DIMENSIONS,
    "Origin.shape[]": _COUNT,
    "Origin.num_nan": _COUNT,
    "Origin.num_inf": _COUNT,
    "Origin.first_index": _DIMENSIONS,
    "Origin.first_index[]": _COUNT,
    "SuspectSample.position": _COUNT,
    "SuspectSample.index": Limit(-1, MAX_COUNT),
    "Experiment.failed_at_step": _COUNT,
    "TrendPoint.step": _FROM_ONE,
    "TrendPoint.lr": _FINITE,
    # As their own definitions have it: from the year 1 to 9999, and 10,000 years either way.
    "Timestamp.seconds": Limit(-62_135_596_800, 253_402_300_799),
    "Timestamp.nanos": Limit(0, 999_999_999),
    "Duration.seconds": Limit(-315_576_000_000, 315_576_000_000),
    "Duration.nanos": Limit(-999_999_999, 999_999_999),
}
"""By "Message.field"; with "[]" that of each value of a repeated field."""


def validate_limits(message: Message) -> None:
    """Examine every field of a message, and of the messages in it.

    Raises:
        InvalidInput: a field is outside its limit; the sentence names field, value and limit.
    """
    for field, limit, each in _limited_fields(message.DESCRIPTOR):
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if limit is not None:
            _validate(field, value, limit)
        if each is not None:
            for item in value:
                _validate(field, item, each)
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for inner in value if field.is_repeated else (value,):
                validate_limits(inner)


def _validate(field: FieldDescriptor, value: object, limit: Limit) -> None:
    if isinstance(value, int | float):
        number, is_now, must = value, "is {}", "be"
    else:
        assert isinstance(value, Sized)
        unit = "characters" if isinstance(value, str) else "values"
        number, is_now, must = len(value), f"has {{}} {unit}", "have"
    if not limit.least <= number <= limit.most:
        raise InvalidInput(
            f"{_name(field)} {is_now.format(number)}; it must {must} from {limit.least} to "
            f"{limit.most}"
        )


@cache
def _limited_fields(
    descriptor: Descriptor,
) -> tuple[tuple[FieldDescriptor, Limit | None, Limit | None], ...]:
    """Return the fields of a message that have a limit: of the field, and of each of its values."""

    def limited() -> Iterator[tuple[FieldDescriptor, Limit | None, Limit | None]]:
        for field in descriptor.fields:
            limits = LIMITS.get(_name(field)), LIMITS.get(f"{_name(field)}[]")
            if limits != (None, None):
                yield field, *limits

    return tuple(limited())


def _name(field: FieldDescriptor) -> str:
    assert field.containing_type is not None
    return f"{field.containing_type.name}.{field.name}"
