"""The servicer: gRPC stops here.

Translates each call to a method of the client API, and the domain's errors to gRPC statuses. The
two calls that carry payloads are served as raw bytes (see fedrounds.wire.framing), the others as
messages.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedrounds.errors import FederationError, InvalidInput
from fedrounds.escaping import MAX_CHARACTERS, printable
from fedrounds.wire.framing import unframe_upload
from fedrounds.wire.limits import validate_limits
from fedrounds.wire.messages import (
    counters_of,
    digest_of,
    incident_of,
    leave_of,
    order_end_message,
    receipt_message,
    registration_of,
    seconds_of,
    session_message,
    update_of,
    work_message,
)
from fedrounds.wire.pb import federation_pb2 as pb
from fedserver.api.client_api import ClientApi
from fedserver.flow_control import StreamFence, first_message

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["FederationService"].full_name

OPTIONS: list[tuple[str, int]] = [
    # A port in use is an error, not shared silently.
    ("grpc.so_reuseport", 0),
    # Beyond 2,000 parked polls gRPC's own limits refuse calls before any handler sees them.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    # Clients ping to notice a dead connection; more often than this ends in GOAWAY.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that died without a word gives back what it holds.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # What ends a connection that says nothing, within 30 s: the keepalive's timeout alone takes 75.
    ("grpc.http2.ping_timeout_ms", 10_000),
    # The probe opens the windows of streams nobody reads yet: megabytes for each that waits.
    ("grpc.http2.bdp_probe", 0),
]

Context = aio.ServicerContext[bytes, bytes]
Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing")
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

# What is larger is no client's of ours, and would hold up everybody while it is taken apart.
_MAX_REQUEST_BYTES = 1 << 20
_MAX_HEADER_BYTES = 256 << 10


class Servicer:
    """The calls of fed.v1.FederationService."""

    def __init__(self, client_api: ClientApi) -> None:
        self._client_api = client_api
        # A client downloads one blob at a time; a download that broke off silently may hang here.
        self._downloads = StreamFence(2)

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        """See federation.proto."""
        return session_message(await self._client_api.register(registration_of(request)))

    async def pull_work(self, request: pb.PullWorkRequest) -> pb.PullWorkResponse:
        """See federation.proto."""
        wait_s = seconds_of(request.wait)
        return work_message(await self._client_api.pull_work(request.session_id, wait_s=wait_s))

    async def query_upload(self, request: pb.QueryUploadRequest) -> pb.QueryUploadResponse:
        """See federation.proto."""
        committed_bytes, is_complete = await self._client_api.committed_bytes(
            request.session_id, request.order_id, digest_of(request.digest)
        )
        return pb.QueryUploadResponse(committed_bytes=committed_bytes, complete=is_complete)

    async def report_progress(self, request: pb.ReportProgressRequest) -> pb.ReportProgressResponse:
        """See federation.proto."""
        order_end = await self._client_api.report_progress(
            request.session_id,
            request.order_id,
            counters=counters_of(request.counters),
            incidents=[
                (incident.sequence, incident_of(incident)) for incident in request.incidents
            ],
            gave_up=request.gave_up,
        )
        return order_end_message(order_end)

    async def leave(self, request: pb.LeaveRequest) -> pb.LeaveResponse:
        """See federation.proto."""
        await self._client_api.leave(request.session_id, leave_of(request))
        return pb.LeaveResponse()

    async def download_blob(self, request: bytes, context: Context) -> None:
        """See federation.proto; writes framed chunks."""
        # By itself: a first write that carries it and is given up leaves gRPC believing that it is
        # still to be sent, which no status gets past. The client would wait for ever.
        await context.send_initial_metadata(())
        wanted = _parse(pb.DownloadBlobRequest, request)
        session_id, digest = wanted.session_id, digest_of(wanted.digest)
        async with self._downloads.join(session_id, what="download of this session"):
            await self._client_api.download(
                session_id, digest, offset=wanted.offset, write=context.write
            )

    async def upload_update(self, messages: AsyncIterator[bytes], context: Context) -> bytes:
        """See federation.proto; reads raw messages."""
        first = await first_message(messages)
        if len(first) > _MAX_HEADER_BYTES:
            raise InvalidInput(
                f"an upload's header has {len(first)} bytes; it may have {_MAX_HEADER_BYTES}"
            )
        header = _parse(pb.UploadUpdateRequest, first).header
        update = update_of(header)
        answer = await self._client_api.upload(
            header.session_id, update, _upload_chunks(messages), offset=header.offset
        )
        return receipt_message(answer).SerializeToString()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the calls' handlers for a gRPC server."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Register": self._unary(self.register, pb.RegisterRequest),
                "PullWork": self._unary(self.pull_work, pb.PullWorkRequest),
                "QueryUpload": self._unary(self.query_upload, pb.QueryUploadRequest),
                "Leave": self._unary(self.leave, pb.LeaveRequest),
                "ReportProgress": self._unary(self.report_progress, pb.ReportProgressRequest),
                "DownloadBlob": grpc.unary_stream_rpc_method_handler(
                    self._with_statuses(self.download_blob, name="DownloadBlob")
                ),
                "UploadUpdate": grpc.stream_unary_rpc_method_handler(
                    self._with_statuses(self.upload_update, name="UploadUpdate")
                ),
            },
        )

    def _unary(
        self,
        call: Callable[[Request], Awaitable[Response]],
        request_class: type[Request],
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        name = request_class.DESCRIPTOR.name

        async def serve(request: bytes, _: Context) -> bytes:
            if len(request) > _MAX_REQUEST_BYTES:
                raise InvalidInput(
                    f"a {name} of {len(request)} bytes; it may have {_MAX_REQUEST_BYTES}"
                )
            response = await call(_parse(request_class, request))
            return response.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(
            self._with_statuses(serve, name=name.removesuffix("Request"))
        )

    def _with_statuses(
        self, call: Callable[[Incoming, Context], Awaitable[Outgoing]], *, name: str
    ) -> Callable[[Incoming, Context], Awaitable[Outgoing]]:
        """Let errors end the call with a status and a sentence, whatever they are."""

        async def serve(request: Incoming, context: Context) -> Outgoing:
            try:
                return await call(request, context)
            except aio.InternalError:
                # The connection ended a moment before gRPC would have cancelled this call for it.
                raise asyncio.CancelledError from None
            except Exception as error:
                await _abort(context, await self._client_api.answer_for(name, error))

        return serve


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a log record of gRPC's says more than that a client has hung up.

    Of an answer that couldn't be sent any more gRPC logs an error, with a traceback.
    """
    return not record.getMessage().startswith("ExecuteBatchError raised in core")


async def start_server(client_api: ClientApi, *, host: str, port: int) -> tuple[aio.Server, str]:
    """Serve the client API, standard health checking and reflection.

    Returns:
        The server, and its address, host:port, as a client would write it.

    Raises:
        InvalidInput: the address can't be listened on.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    server = aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((Servicer(client_api).handlers(),))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    for name in ("", SERVICE_NAME):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection(
        (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    try:
        bound_port = server.add_insecure_port(_address(host, port))
    except RuntimeError as error:
        raise InvalidInput(
            f"can't listen on {_address(host, port)}: {_why_not(host, port)}; choose another "
            "--port (0 takes any free one) or --host"
        ) from error
    await server.start()
    return server, _address(host, bound_port)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _why_not(host: str, port: int) -> str:
    """Return in words why an address can't be listened on, which gRPC says in its own log alone."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
                trial.listen()
    except socket.gaierror:
        return "no such host is known"
    except OSError as error:
        return {
            errno.EADDRINUSE: "the port is in use",
            errno.EADDRNOTAVAIL: "the address isn't this machine's",
            errno.EACCES: "this user may not use that port",
        }.get(error.errno or 0, error.strerror or str(error))
    return "the port is in use or the address isn't this machine's"


async def _abort(context: Context, error: FederationError) -> NoReturn:
    try:
        sentence = printable(str(error)).encode("ascii", "backslashreplace").decode()
        await context.abort(grpc.StatusCode[error.status], sentence[:MAX_CHARACTERS])
    except aio.InternalError:
        # The client has hung up: there is nobody to answer.
        raise asyncio.CancelledError from None


def _parse(message_class: type[Request], raw: bytes) -> Request:
    try:
        message = message_class.FromString(raw)
    except DecodeError as error:
        raise InvalidInput(f"the bytes aren't a {message_class.__name__}: {error}") from error
    validate_limits(message)
    return message


async def _upload_chunks(messages: AsyncIterator[bytes]) -> AsyncIterator[memoryview]:
    async for message in messages:
        yield unframe_upload(message)
