"""What any gRPC tool sees: health, reflection, and answers to bytes that mean nothing."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.peer import OpenRound, Peer, expect_status, open_round, payload_of
from tests.processes import GENEROUS_S, Server

SERVICE = "fed.v1.FederationService"
UNARY = ["Register", "PullWork", "QueryUpload", "ReportProgress"]

GARBAGE = {
    "a broken tag": b"\xff" * 40,
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "a field that claims more than there is": b"\x0a\x7fabc",
    "a length without end": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
}

NEW_FIELD = b"\xfa\x7f\x03new"
"""Field 2047 with three bytes, which no message of ours has."""


def call_raw(
    channel: Any,  # noqa: ANN401  # the stubs have no calls without serializers
    method: str,
    *messages: bytes,
) -> list[bytes]:
    """Make a call with these bytes for messages, whatever they are; returns the answers' bytes."""
    path = f"/{SERVICE}/{method}"
    if method == "DownloadBlob":
        return list(channel.unary_stream(path)(messages[0], timeout=GENEROUS_S))
    if method == "UploadUpdate":
        return [channel.stream_unary(path)(iter(messages), timeout=GENEROUS_S)]
    return [channel.unary_unary(path)(messages[0], timeout=GENEROUS_S)]


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    """Give a bare channel to the shared server."""
    with grpc.insecure_channel(server.address) as opened:
        yield opened


def test_the_health_check_answers_serving(channel: grpc.Channel) -> None:
    """Standard health probes work for the server as a whole and for the service by name."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=GENEROUS_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(channel: grpc.Channel) -> None:
    """A generic client such as grpcurl finds the service and its methods without the file."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests), timeout=GENEROUS_S)
    names = {service.name for service in listed.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    files = described.file_descriptor_response.file_descriptor_proto
    assert any(b"UploadUpdate" in file for file in files)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("method", [*UNARY, "DownloadBlob", "UploadUpdate"])
def test_bytes_that_are_no_message_are_an_invalid_argument(
    channel: grpc.Channel, server: Server, method: str, garbage: str
) -> None:
    """Whatever arrives on a method, the answer is a status with a sentence, never a crash."""
    expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: call_raw(channel, method, GARBAGE[garbage]),
        match="aren't a",
    )
    assert server.is_running
    assert server.count_lines("server-failed") == 0


@pytest.mark.parametrize("garbage", [*GARBAGE.values(), b"\x12\x03ab", b"\x12\x01abc"])
def test_garbage_in_the_middle_of_an_upload_is_an_invalid_argument(
    opened: OpenRound, channel: grpc.Channel, garbage: bytes
) -> None:
    """Chunks are read by hand, not by protobuf; malformed chunks are still refused."""
    peer, order = opened.peers[0], opened.orders[0]
    header = peer.header(order, b"x" * 500).SerializeToString()
    expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: call_raw(channel, "UploadUpdate", header, garbage),
    )
    assert opened.settle(0) == [pb.RECEIPT_STORED]


def test_an_upload_with_fields_of_a_newer_protocol_is_stored(
    opened: OpenRound, channel: grpc.Channel
) -> None:
    """Fields the server doesn't know are passed over: in the header, beside data, and alone."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(opened.base)
    header = peer.header(order, payload).header.SerializeToString() + NEW_FIELD
    data = [
        pb.UploadUpdateRequest(data=data).SerializeToString()
        for data in (payload[:500], payload[500:])
    ]
    messages = [
        b"\x0a" + bytes([len(header) & 0x7F | 0x80, len(header) >> 7]) + header,
        NEW_FIELD,
        NEW_FIELD + data[0],
        data[1] + NEW_FIELD,
    ]
    (answer,) = call_raw(channel, "UploadUpdate", *messages)
    assert pb.UploadUpdateResponse.FromString(answer).receipt == pb.RECEIPT_STORED


def test_empty_messages_get_an_answer_too(channel: grpc.Channel, server: Server) -> None:
    """A request with nothing in it is malformed or without a session, and nothing worse."""
    expected = {
        "Register": grpc.StatusCode.INVALID_ARGUMENT,
        "PullWork": grpc.StatusCode.UNAUTHENTICATED,
        "QueryUpload": grpc.StatusCode.INVALID_ARGUMENT,
        "ReportProgress": grpc.StatusCode.UNAUTHENTICATED,
    }
    for method, code in expected.items():
        expect_status(code, partial(call_raw, channel, method, b""))
    assert server.count_lines("server-failed") == 0


@pytest.mark.parametrize("seconds", [2**62, -(2**62)])
def test_a_wait_that_no_clock_can_hold_gets_an_answer(
    stranger: Peer, server: Server, seconds: int
) -> None:
    """Durations are numbers from outside like any other: out of range is malformed, no crash."""
    session_id = stranger.register().session_id
    expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: stranger.stub.PullWork(
            pb.PullWorkRequest(session_id=session_id, wait=Duration(seconds=seconds)),
            timeout=GENEROUS_S,
        ),
    )
    assert server.count_lines("server-failed") == 0


def test_a_method_that_is_not_there_is_unimplemented(channel: grpc.Channel) -> None:
    """A newer client learns from the standard status that this server is older."""
    expect_status(
        grpc.StatusCode.UNIMPLEMENTED,
        lambda: call_raw(channel, "Predict", b""),
    )


def test_the_server_still_serves_rounds_after_all_that(
    peers: dict[int, Peer], server: Server
) -> None:
    """Rounds go on with the clients that behave."""
    first = open_round(peers)
    assert first.settle() == [pb.RECEIPT_STORED] * len(peers)
    second = open_round(peers)
    assert second.orders[0].round == first.orders[0].round + 1
    second.settle()
    assert server.count_lines("Traceback") == 0
