"""The calls to the server: gRPC stops here, on the client's side.

Every method makes one call and raises the domain's errors; fedclient.session repeats calls.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import TypeVar, cast

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from fedclient.routes import Proxy, Route
from fedrounds.errors import (
    ClientIdTaken,
    CorruptPayload,
    FederationError,
    InvalidInput,
    NotFound,
    OutOfSpace,
    ProxyRefused,
    ServerUnreachable,
    StreamFenced,
    UnknownSession,
    WrongOffset,
    WrongSettings,
)
from fedrounds.escaping import printable
from fedrounds.types import (
    ClientUpdate,
    Counters,
    Incident,
    Leave,
    OrderEnd,
    Registration,
    SessionInfo,
    UploadAnswer,
    Work,
)
from fedrounds.wire.framing import CHUNK_BYTES, frame_upload, unframe_download
from fedrounds.wire.limits import validate_limits
from fedrounds.wire.messages import (
    duration_message,
    leave_message,
    order_end_of,
    progress_message,
    receipt_of,
    registration_message,
    session_of,
    upload_header,
    work_of,
)
from fedrounds.wire.pb import federation_pb2 as pb
from fedrounds.wire.pb.federation_pb2_grpc import FederationServiceStub

Answer = TypeVar("Answer", pb.RegisterResponse, pb.PullWorkResponse)

_OPTIONS = [
    # A proxy is used only where the route names it (see fedclient.routes).
    ("grpc.enable_http_proxy", 0),
    # Connects to a restarted server within a second or two.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A connection that died without a word is noticed.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # This is what ends it within 30 s: the keepalive's timeout alone takes 60.
    ("grpc.http2.ping_timeout_ms", 10_000),
]
_CALL_TIMEOUT_S = 30.0

_ERRORS: dict[grpc.StatusCode, type[FederationError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.FAILED_PRECONDITION: WrongSettings,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: UnknownSession,
    grpc.StatusCode.ALREADY_EXISTS: ClientIdTaken,
    grpc.StatusCode.ABORTED: StreamFenced,
    grpc.StatusCode.OUT_OF_RANGE: WrongOffset,
    grpc.StatusCode.DATA_LOSS: CorruptPayload,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OutOfSpace,
    grpc.StatusCode.UNIMPLEMENTED: WrongSettings,
}
_CAUSES = {
    "Connection refused": "the connection is refused (is the server started, and is this "
    "its port?)",
    "Domain name not found|address lookup failed|DNS": "no such host is known (is it misspelt?)",
    "Deadline Exceeded": "nothing comes back (is the address right, and is there a firewall or a "
    "proxy on the way?)",
    "failed to connect.*(Socket closed|reset|recvmsg)": "the connection is closed at once (does "
    "the server expect TLS, or is it no fedserver?)",
    "Failed parsing HTTP/2|Method not found": "what answers at the "
    "server's address isn't a fedserver, or is one of another version",
    "No route to host|Network is unreachable": "no network leads to that address",
    "Socket closed|Stream removed|Connection reset": "the connection broke off",
}
"""What may be the cause, by a pattern in what gRPC says."""

_PROXY_CAUSES = {
    "HTTP proxy returned": "doesn't let this connection through",
    "Connection refused": "refuses the connection (is it started, and is this its port?)",
    "Domain name not found|address lookup failed|DNS": "isn't a known host (is it misspelt?)",
    "No route to host|Network is unreachable": "can't be reached: no network leads to it",
}
"""The same where the connection goes through a proxy, which is then what failed."""

_HTTP_STATUS = re.compile(r"http2 header with status: (\d+)")
"""The words of gRPC's error for an answer that comes from an HTTP proxy on the way."""

_PASSING_HTTP_STATUSES = {408, 429, 500, 502, 503, 504}
"""The server can't be reached for now; any other status is the proxy's own decision."""

_BODY_ADVICE = (
    "its limit on the size of a body is smaller than an update; raise it (nginx: "
    "`client_max_body_size 0;` beside `grpc_pass`)"
)
_PATH_ADVICE = (
    "it doesn't pass these calls on; let it forward the paths below /fed.v1.FederationService/ by "
    "HTTP/2 (nginx: `grpc_pass`), or give --server the server's own address"
)
_ENTRY_ADVICE = "it doesn't let this client in; ask who runs it for access"
_HTTP_ADVICE = {
    **dict.fromkeys((400, 404, 405, 415, 421, 426, 501, 505), _PATH_ADVICE),
    **dict.fromkeys((401, 403, 407), _ENTRY_ADVICE),
    413: _BODY_ADVICE,
}

_MAX_WAIT_S = 3600.0
"""A call isn't parked longer than that, whatever the server offers."""


class Connection:
    """One channel to the server; `close` ends every call that is under way on it."""

    def __init__(self, route: Route) -> None:
        self._proxy = route.proxy
        self._channel = _open_channel(route)
        self._stub = FederationServiceStub(self._channel)
        service = f"/{pb.DESCRIPTOR.services_by_name['FederationService'].full_name}"
        # The two calls with payloads pass raw bytes (see fedrounds.wire.framing).
        self._download = self._channel.unary_stream(
            f"{service}/DownloadBlob",
            request_serializer=pb.DownloadBlobRequest.SerializeToString,
            response_deserializer=_as_it_is,
        )
        self._upload = self._channel.stream_unary(
            f"{service}/UploadUpdate",
            request_serializer=_as_it_is,
            response_deserializer=pb.UploadUpdateResponse.FromString,
        )

    def close(self) -> None:
        """End all calls; may be called from another thread."""
        self._channel.close()

    def check(self, *, timeout_s: float) -> None:
        """Return as soon as the server answers, whatever it says of its health.

        Raises:
            ServerUnreachable: there is no answer, and `timeout_s` seconds have passed or the
                connection failed; the message says what may be the cause.
        """
        try:
            with _errors_translated(self._proxy):
                request = health_pb2.HealthCheckRequest()
                # The stubs don't declare what a HealthStub gets as it is made.
                HealthStub(self._channel).Check(request, timeout=timeout_s)  # type: ignore[attr-defined]
        except ServerUnreachable:
            raise
        except FederationError:
            # An answer: Register will say what is wrong.
            pass

    def register(self, registration: Registration) -> SessionInfo:
        """Open a session, or take over the session that this instance had."""
        with _errors_translated(self._proxy):
            answer = self._stub.Register(
                registration_message(registration), timeout=_CALL_TIMEOUT_S
            )
        session = session_of(_examined(answer))
        return replace(session, max_wait_s=min(session.max_wait_s, _MAX_WAIT_S))

    def leave(self, session_id: str, leave: Leave, *, timeout_s: float = _CALL_TIMEOUT_S) -> None:
        """Leave the run with some of the session's ids, or with all of them."""
        with _errors_translated(self._proxy):
            self._stub.Leave(leave_message(session_id, leave), timeout=timeout_s)

    def pull_work(self, session_id: str, *, wait_s: float) -> Work:
        """Ask for work, parked by the server for at most `wait_s` seconds."""
        with _errors_translated(self._proxy):
            answer = self._stub.PullWork(
                pb.PullWorkRequest(session_id=session_id, wait=duration_message(wait_s)),
                timeout=wait_s + _CALL_TIMEOUT_S,
            )
        return work_of(_examined(answer))

    def download(self, session_id: str, digest: str, *, offset: int) -> Iterator[memoryview]:
        """Yield a blob's bytes from `offset` to its end."""
        request = pb.DownloadBlobRequest(session_id=session_id, digest=digest, offset=offset)
        with _errors_translated(self._proxy):
            for message in self._download(request):
                yield unframe_download(message)

    def committed_bytes(self, session_id: str, update: ClientUpdate) -> int:
        """Return from which byte on an update is to be sent; all of them if it is recorded."""
        request = pb.QueryUploadRequest(
            session_id=session_id, order_id=update.order_id, digest=update.digest
        )
        with _errors_translated(self._proxy):
            answer = self._stub.QueryUpload(request, timeout=_CALL_TIMEOUT_S)
        return update.size_bytes if answer.complete else answer.committed_bytes

    def upload(
        self,
        session_id: str,
        update: ClientUpdate,
        payload: Path,
        *,
        offset: int,
        on_sent: Callable[[int], None],
    ) -> UploadAnswer:
        """Send an update's bytes from `offset` on; `on_sent` hears of every chunk's size."""
        header = pb.UploadUpdateRequest(header=upload_header(session_id, update, offset=offset))
        with payload.open("rb", buffering=0) as file, _errors_translated(self._proxy):
            file.seek(offset)
            messages = _upload_messages(header.SerializeToString(), file, on_sent)
            answer = self._upload(messages)
        return receipt_of(answer)

    def report_progress(
        self,
        session_id: str,
        order_id: str,
        *,
        counters: Counters,
        incidents: Sequence[tuple[int, Incident]] = (),
        gave_up: bool = False,
    ) -> OrderEnd | None:
        """Report how far an order is, and what went wrong.

        Returns how the order has ended, None while it goes on.

        Each incident comes with its number in the order, from 1 to MAX_INCIDENTS: sent again with
        the same number, it is kept once.
        """
        request = progress_message(
            session_id, order_id, counters=counters, incidents=incidents, gave_up=gave_up
        )
        with _errors_translated(self._proxy):
            answer = self._stub.ReportProgress(request, timeout=_CALL_TIMEOUT_S)
        return order_end_of(answer)


def _open_channel(route: Route) -> grpc.Channel:
    if route.proxy is None:
        return grpc.insecure_channel(route.server, options=_OPTIONS)
    # What gRPC does for a proxy of the environment, which can't be asked for by itself: the channel
    # goes to the proxy, and each connection begins with CONNECT.
    options: list[tuple[str, int | str]] = [
        *_OPTIONS,
        ("grpc.http_connect_server", route.server),
        ("grpc.default_authority", route.server),
    ]
    if route.proxy.authorization:
        headers = f"Proxy-Authorization: {route.proxy.authorization}"
        options.append(("grpc.http_connect_headers", headers))
    return grpc.insecure_channel(route.proxy.address, options=options)


@contextmanager
def _errors_translated(proxy: Proxy | None) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        call = cast(grpc.Call, error)
        details = printable(call.details() or call.code().name)
        if (http_status := _HTTP_STATUS.search(details)) is not None:
            raise _proxy_error(int(http_status[1])) from error
        # Whatever isn't a clear answer of the server's (UNAVAILABLE, CANCELLED, a deadline, an
        # error of its own) may go away by itself.
        kind = _ERRORS.get(call.code(), ServerUnreachable)
        raise kind(_with_cause(details, proxy)) from error
    except ValueError as error:
        if isinstance(error, FederationError):
            raise
        # What gRPC says of a call on a channel that was closed.
        raise ServerUnreachable(str(error)) from error


def _proxy_error(status: int) -> FederationError:
    """Return the meaning of an HTTP status that a proxy answered in the server's place."""
    if status in _PASSING_HTTP_STATUSES:
        return ServerUnreachable(
            f"an HTTP proxy on the way answers {status}: it doesn't reach the server for now"
        )
    advice = _HTTP_ADVICE.get(status, "it refuses the call; ask who runs it")
    return ProxyRefused(f"an HTTP proxy on the way answers {status}: {advice}")


def _examined(answer: Answer) -> Answer:
    """Return an answer of the server's if its fields keep their limits.

    Raises:
        WrongSettings: a field doesn't.
    """
    try:
        validate_limits(answer)
    except InvalidInput as error:
        raise WrongSettings(f"the server's answer can't be right: {error}") from error
    return answer


def _with_cause(details: str, proxy: Proxy | None) -> str:
    """Return the cause of an error in words; gRPC's own words where it isn't known."""
    if proxy is not None:
        for pattern, failure in _PROXY_CAUSES.items():
            if re.search(pattern, details):
                return f"the proxy {proxy.address} {failure}"
    return next(
        (cause for pattern, cause in _CAUSES.items() if re.search(pattern, details)), details
    )


def _upload_messages(
    header: bytes, file: FileIO, on_sent: Callable[[int], None]
) -> Iterator[bytes]:
    yield header
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        while count := file.readinto(buffer):
            yield frame_upload(buffer[:count])
            on_sent(count)
    except (OSError, ValueError):
        # The answer came before all was sent; gRPC's thread may still ask for more then.
        if not file.closed:
            raise


def _as_it_is(message: bytes) -> bytes:
    return message
