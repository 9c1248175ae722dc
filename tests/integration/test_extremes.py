"""Every field of every request with the least, the largest and the strangest values it can hold.

The server answers each with one of the statuses that federation.proto names, and a sentence; it
goes on, and keeps no number that the protocol forbids.
"""

import math
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrounds.tensors.codec import digest_bytes
from fedrounds.wire.diagnosis import diagnosis_message
from fedrounds.wire.pb import federation_pb2 as pb
from tests.factories import make_diagnosis
from tests.integration.conftest import MAX_NUM_EXAMPLES
from tests.integration.peer import Peer
from tests.processes import GENEROUS_S, Scene, Server

DOCUMENTED = {
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED),
    *(grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.ABORTED),
    *(grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.FAILED_PRECONDITION),
    *(grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE),
}
"""RESOURCE_EXHAUSTED and INTERNAL are documented too, and would be the server's own failures."""

INTEGERS = (
    *(0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**53, 2**53 + 1),
    *(2**63 - 1, -(2**63), 2**64 - 1),
)
REALS = (0.0, -1.0, 0.5, 1e31, 1e308, math.nan, math.inf, -math.inf)
TEXTS = ("", "x", "\0", "\x1b[2J", "x" * 129, "\u00e9" * 2000, "y" * 200_000, "a" * 64)
SIZE = 500
PAYLOAD = b"x" * SIZE
LEAST_ONE = ("step", "noticed_at_step", "epoch", "batch")
LEAST_ZERO = ("batch_size", "num_samples", "returned_to_step", "num_replayed_steps", "position")


def values_of(field: FieldDescriptor) -> tuple[Any, ...]:
    """Return the values to try in a field that isn't a message."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return TEXTS
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return REALS
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return (False, True)
    return INTEGERS


def is_map(field: FieldDescriptor) -> bool:
    """Whether a field is a map; ours are from texts to numbers."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def places_in(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Yield each field of a message and of the messages that are in it, with its owner."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    for field in fields:
        yield message, field
        if field.message_type is None or is_map(field):
            continue
        held = getattr(message, field.name)
        for inner in held if field.is_repeated else (held,):
            yield from places_in(inner)


def put(owner: Message, field: FieldDescriptor, value: Any) -> bool:  # noqa: ANN401
    """Set a field, or the only value of a repeated one; whether its type can hold the value."""
    try:
        if is_map(field):
            getattr(owner, field.name)["lr"] = value
        elif field.is_repeated:
            owner.ClearField(field.name)
            getattr(owner, field.name).append(value)
        else:
            setattr(owner, field.name, value)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def choices(message: Message) -> list[tuple[int, Any]]:
    """Return what can be changed in a message: the number of a place, and a value for it."""
    changes: list[tuple[int, Any]] = []
    for number, (_, field) in enumerate(places_in(message)):
        if is_map(field):
            changes += [(number, value) for value in REALS]
        elif field.message_type is None:
            changes += [(number, value) for value in values_of(field)]
    return changes


class Requester:
    """A client that makes any request, with an order to name and a fresh number for each report."""

    def __init__(self, server: Server) -> None:
        self._peer = Peer(server.address, 0)
        self._num_reports = 0
        self.order = self._peer.pull_order()

    def base(self, method: str) -> Message:
        """Return a request as an honest client makes it, with something in every message."""
        session_id, order_id = self._peer.session_id, self.order.order_id
        digest = digest_bytes(PAYLOAD)
        header = pb.UploadHeader(
            session_id=session_id,
            order_id=order_id,
            digest=digest,
            size_bytes=SIZE,
            sections=[pb.Section(name="model", size_bytes=SIZE)],
            encoding=pb.ENCODING_STATE_DICT,
            num_examples=10,
            num_steps=4,
        )
        self._num_reports += 1
        incident = pb.Incident(
            sequence=self._num_reports % 64 + 1,
            kind=pb.INCIDENT_KIND_TRAINING_DIAGNOSED,
            step=17,
            epoch=2,
            tensor="0.weight",
            at=Timestamp(seconds=1),
            diagnosis=diagnosis_message(make_diagnosis()),
        )
        requests: dict[str, Message] = {
            # Of an id that takes no part in rounds, as long as it doesn't tell its data.
            "Register": pb.RegisterRequest(
                client_ids=[60], instance_key="key", software_version="1", capabilities=["int8"]
            ),
            "PullWork": pb.PullWorkRequest(session_id=session_id, wait=Duration(seconds=0)),
            "DownloadBlob": pb.DownloadBlobRequest(
                session_id=session_id, digest=self.order.sections[0].digest
            ),
            "QueryUpload": pb.QueryUploadRequest(
                session_id=session_id, order_id=order_id, digest=digest
            ),
            "UploadUpdate": pb.UploadUpdateRequest(header=header),
            "ReportProgress": pb.ReportProgressRequest(
                session_id=session_id,
                order_id=order_id,
                counters=pb.Counters(batches=1),
                incidents=[incident],
            ),
            # Nobody's session: this client stays.
            "Leave": pb.LeaveRequest(session_id="another", client_ids=[0]),
        }
        return requests[method]

    def send(self, method: str, request: Message) -> None:
        """Make a call, and examine how it ends."""
        stub: Any = self._peer.stub
        try:
            match method:
                case "UploadUpdate":
                    messages = [request, pb.UploadUpdateRequest(data=PAYLOAD)]
                    stub.UploadUpdate(iter(messages), timeout=GENEROUS_S)
                case "DownloadBlob":
                    list(stub.DownloadBlob(request, timeout=GENEROUS_S))
                case _:
                    getattr(stub, method)(request, timeout=GENEROUS_S)
        except grpc.RpcError as error:
            call: Any = error
            assert call.code() in DOCUMENTED, f"{method} {call.code()}: {call.details()}\n{request}"
            sentence = call.details()
            assert sentence.isascii()
            assert sentence.isprintable()
            assert 10 < len(sentence) <= 1000

    def renew(self) -> None:
        """Take the order that is open now, if the last order has ended."""
        work = self._peer.pull(wait_s=0)
        if work.state == pb.WORK_STATE_ORDER:
            self.order = work.order

    def close(self) -> None:
        """End the connection."""
        self._peer.close()


@pytest.fixture(scope="module")
def target(module_scene: Scene) -> Server:
    """Give a server whose run never ends by itself."""
    started = module_scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 100_000, "--max-attempts", 100_000),
        *("--min-clients", 1, "--stall-after", 3600, "--lease", 3600),
        *("--max-num-examples", MAX_NUM_EXAMPLES),
    )
    started.wait_for_line("fedserver listening on")
    return started


@pytest.fixture(scope="module")
def requester(target: Server) -> Iterator[Requester]:
    """Give a client with an order."""
    made = Requester(target)
    yield made
    made.close()


METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["FederationService"].methods]


@pytest.mark.parametrize("method", METHODS)
def test_one_field_at_a_time(requester: Requester, target: Server, method: str) -> None:
    """Everything else is as an honest client sends it."""
    for number, value in choices(requester.base(method)):
        request = requester.base(method)
        owner, field = list(places_in(request))[number]
        is_data_size = field.name == "num_examples" and method == "Register"
        if is_data_size and 1 <= value <= MAX_NUM_EXAMPLES:
            # A good registration: this client would be asked in the rounds to come.
            continue
        if put(owner, field, value):
            requester.send(method, request)
        requester.renew()
    assert target.is_running
    assert target.count_lines("server-failed|Traceback") == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_several_fields_at_a_time(
    requester: Requester, target: Server, data: st.DataObject
) -> None:
    """Any of them, in the calls that record something."""
    method = data.draw(st.sampled_from(["ReportProgress", "UploadUpdate", "QueryUpload"]))
    request = requester.base(method)
    changes = st.lists(st.sampled_from(choices(request)), min_size=2, max_size=5)
    for number, value in data.draw(changes):
        places = list(places_in(request))
        owner, field = places[number % len(places)]
        put(owner, field, value)
    requester.send(method, request)
    requester.renew()
    assert target.count_lines("server-failed|Traceback") == 0


def numbers_in(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value of an incident, with its name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers_in(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers_in(inner, name)
    else:
        yield name, value


def test_nothing_is_kept_that_the_protocol_forbids(module_scene: Scene, target: Server) -> None:
    """After all that: the numbers of every incident on record."""
    assert target.is_running
    incidents = [incident for entry in module_scene.history() for incident in entry["incidents"]]
    diagnosed = [incident for incident in incidents if incident["kind"] == "training-diagnosed"]
    assert len(diagnosed) > 10
    for name, value in (
        pair for incident in diagnosed for pair in numbers_in(incident["diagnosis"])
    ):
        if name in LEAST_ONE:
            assert isinstance(value, int)
            assert 1 <= value <= 2**53, name
        elif name in LEAST_ZERO:
            assert isinstance(value, int)
            assert 0 <= value <= 2**53, name
        elif name == "lr":
            assert isinstance(value, float)
            assert value >= 0
