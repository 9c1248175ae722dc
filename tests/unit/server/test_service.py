"""The servicer over a real connection in this process: each call there and back, its errors."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from fedrounds.tensors.codec import digest_bytes
from fedrounds.types import RunEnd, RunFailure
from fedrounds.wire.pb import federation_pb2 as pb
from fedrounds.wire.pb.federation_pb2_grpc import FederationServiceStub
from fedserver.api import service
from fedserver.api.service import start_server
from tests.server_run import NUM_EXAMPLES, ServerRun, serving

SETTINGS: dict[str, Any] = {"min_clients": 1}

Calls = Callable[[Any, ServerRun, aio.Channel], Coroutine[Any, Any, None]]


def call(folder: Path, calls: Calls, **settings: Any) -> None:  # noqa: ANN401
    """Let a client make calls to a server, each over the wire."""
    with serving(folder, **SETTINGS | settings) as server:

        async def connect() -> None:
            listening, address = await start_server(server.client_api, host="127.0.0.1", port=0)
            try:
                async with aio.insecure_channel(address) as channel:
                    await calls(FederationServiceStub(channel), server, channel)
            finally:
                await listening.stop(None)

        asyncio.run(connect())


async def register(stub: Any, client_id: int = 0) -> str:  # noqa: ANN401
    """Register a client; returns its session's id."""
    answer = await stub.Register(
        pb.RegisterRequest(client_ids=[client_id], instance_key="key", num_examples=[NUM_EXAMPLES])
    )
    return str(answer.session_id)


async def status_of(answer: Any) -> grpc.StatusCode:  # noqa: ANN401
    """Return the status that a call ends with."""
    with pytest.raises(aio.AioRpcError) as error:
        await answer
    code: grpc.StatusCode = error.value.code()
    return code


def test_a_round_over_the_wire(tmp_path: Path) -> None:
    """Register, pull, download, report, upload in two parts, query, leave."""

    async def play(stub: Any, server: ServerRun, _: aio.Channel) -> None:  # noqa: ANN401
        session_id = await register(stub)
        waiting = await stub.PullWork(pb.PullWorkRequest(session_id=session_id))
        assert waiting.state == pb.WORK_STATE_WAIT
        await server.go_on()
        work = await stub.PullWork(
            pb.PullWorkRequest(session_id=session_id, wait=Duration(seconds=20))
        )
        assert work.state == pb.WORK_STATE_ORDER
        order = server.order_of(0)
        assert work.order.order_id == order.order_id
        wanted = pb.DownloadBlobRequest(session_id=session_id, digest=order.sections[0].digest)
        blob = b"".join([chunk.data async for chunk in stub.DownloadBlob(wanted)])
        assert digest_bytes(blob) == order.sections[0].digest
        report = pb.ReportProgressRequest(session_id=session_id, order_id=order.order_id)
        progress = await stub.ReportProgress(report)
        assert progress.directive == pb.DIRECTIVE_CONTINUE
        payload = server.payload_of(order)
        header = pb.UploadHeader(
            session_id=session_id,
            order_id=order.order_id,
            digest=digest_bytes(payload),
            size_bytes=len(payload),
            sections=[pb.Section(name="model", size_bytes=len(payload))],
            encoding=pb.ENCODING_STATE_DICT,
            num_examples=NUM_EXAMPLES,
            num_steps=4,
        )
        parts = [payload[:100], payload[100:]]
        messages = [
            pb.UploadUpdateRequest(header=header),
            *(pb.UploadUpdateRequest(data=part) for part in parts),
        ]
        stored = await stub.UploadUpdate(iter(messages))
        assert stored.receipt == pb.RECEIPT_STORED
        query = pb.QueryUploadRequest(
            session_id=session_id, order_id=order.order_id, digest=header.digest
        )
        assert (await stub.QueryUpload(query)).complete
        await server.closer.close(server.latest())
        header.digest = digest_bytes(b"other")
        other = pb.UploadUpdateRequest(header=header)
        contradicting = await stub.UploadUpdate(iter([other]))
        assert contradicting.receipt == pb.RECEIPT_REFUSED
        await stub.Leave(pb.LeaveRequest(session_id=session_id, reason=pb.LEAVE_REASON_STOPPED))
        assert server.kinds_of_events()[-1] == "client-left"
        pull = stub.PullWork(pb.PullWorkRequest(session_id=session_id))
        assert await status_of(pull) is grpc.StatusCode.UNAUTHENTICATED

    call(tmp_path, play)


def test_a_run_that_has_failed_says_so(tmp_path: Path) -> None:
    """With the kind of its last failure."""

    async def finish(stub: Any, server: ServerRun, _: aio.Channel) -> None:  # noqa: ANN401
        session_id = await register(stub)
        run_end = RunEnd(has_failed=True, failure=RunFailure.TOO_FEW_UPDATES)
        finishing = asyncio.create_task(server.client_api.finish(run_end))
        work = await stub.PullWork(
            pb.PullWorkRequest(session_id=session_id, wait=Duration(seconds=20))
        )
        assert work.state == pb.WORK_STATE_FINISHED
        assert work.outcome == pb.RUN_OUTCOME_FAILED
        assert work.failure == pb.RUN_FAILURE_TOO_FEW_UPDATES
        await finishing

    call(tmp_path, finish, farewell=300)


def test_an_order_that_was_given_up_is_to_be_abandoned(tmp_path: Path) -> None:
    """The answer says how it ended, and so does that to an update that comes later."""

    async def give_up(stub: Any, server: ServerRun, _: aio.Channel) -> None:  # noqa: ANN401
        session_id = await register(stub)
        await server.go_on()
        order = server.order_of(0)
        answer = await stub.ReportProgress(
            pb.ReportProgressRequest(session_id=session_id, order_id=order.order_id, gave_up=True)
        )
        assert answer.directive == pb.DIRECTIVE_ABANDON
        assert answer.order_end == pb.ORDER_END_GIVEN_UP
        payload = server.payload_of(order)
        header = pb.UploadHeader(
            session_id=session_id,
            order_id=order.order_id,
            digest=digest_bytes(payload),
            size_bytes=len(payload),
            sections=[pb.Section(name="model", size_bytes=len(payload))],
            encoding=pb.ENCODING_STATE_DICT,
            num_examples=NUM_EXAMPLES,
        )
        late = await stub.UploadUpdate(iter([pb.UploadUpdateRequest(header=header)]))
        assert (late.receipt, late.order_end) == (pb.RECEIPT_LATE, pb.ORDER_END_GIVEN_UP)

    call(tmp_path, give_up)


def test_what_is_no_request_is_refused_with_a_status(tmp_path: Path) -> None:
    """Bytes that aren't a message, messages beyond their bounds, reasons that there aren't."""

    async def misbehave(stub: Any, _: ServerRun, channel: aio.Channel) -> None:  # noqa: ANN401
        raw: Any = channel.unary_unary(f"/{service.SERVICE_NAME}/Register")
        assert await status_of(raw(b"\xff\xff")) is grpc.StatusCode.INVALID_ARGUMENT
        too_long = b"x" * (service._MAX_REQUEST_BYTES + 1)
        assert await status_of(raw(too_long)) is grpc.StatusCode.INVALID_ARGUMENT
        unknown = pb.LeaveRequest(session_id="x", reason=pb.LEAVE_REASON_UNSPECIFIED)
        assert await status_of(stub.Leave(unknown)) is grpc.StatusCode.INVALID_ARGUMENT
        upload: Any = channel.stream_unary(f"/{service.SERVICE_NAME}/UploadUpdate")
        long_header = b"x" * (service._MAX_HEADER_BYTES + 1)
        assert await status_of(upload(iter([long_header]))) is grpc.StatusCode.INVALID_ARGUMENT

    call(tmp_path, misbehave)


def test_an_error_that_nobody_foresaw_reaches_no_client_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is recorded, and the call may be repeated."""

    async def fail(stub: Any, server: ServerRun, _: aio.Channel) -> None:  # noqa: ANN401
        def forget(_: object) -> None:
            raise RuntimeError("our secret")

        monkeypatch.setattr(server.sessions, "register", forget)
        with pytest.raises(aio.AioRpcError) as error:
            await register(stub)
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert "our secret" not in (error.value.details() or "")
        (failed,) = server.events
        assert failed.fields == {"what": "Register", "reason": "RuntimeError: our secret"}

    call(tmp_path, fail)
