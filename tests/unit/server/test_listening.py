"""Where a server listens: the address as it is written, printed and refused."""

import asyncio
import logging
import os
import socket
from typing import cast

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from fedrounds.cli import silence_grpc
from fedrounds.errors import InvalidInput
from fedserver.api.client_api import ClientApi
from fedserver.api.service import start_server
from fedserver.settings import ServerSettings


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def _refusal(host: str, port: int = 0) -> str:
    """Return the sentence for an address that can't be listened on."""
    with pytest.raises(InvalidInput) as error:
        asyncio.run(start_server(cast(ClientApi, None), host=host, port=port))
    return str(error.value)


@pytest.mark.skipif(not _has_ipv6(), reason="there is no IPv6 here")
@pytest.mark.parametrize("written", ["::1", "[::1]"])
def test_an_ipv6_address_is_printed_as_a_client_writes_it(written: str) -> None:
    """With brackets or without; a client reaches the server there."""

    async def reach() -> str:
        host = ServerSettings(host=written).host
        server, address = await start_server(cast(ClientApi, None), host=host, port=0)
        async with grpc.aio.insecure_channel(address) as channel:
            answer = await HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest()
            )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await server.stop(None)
        return address

    assert asyncio.run(reach()).startswith("[::1]:")


@pytest.mark.parametrize("host", ["", "[]", "a/b", "localhost:50051", "two words"])
def test_what_can_be_no_host_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="host"):
        ServerSettings(host=host)


def test_the_error_says_why_an_address_cant_be_listened_on() -> None:
    """In use, somebody else's, unknown: each has another remedy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "the port is in use" in _refusal("127.0.0.1", taken.getsockname()[1])
    # RFC 5737: no machine has this address.
    assert "the address isn't this machine's" in _refusal("192.0.2.1")
    assert "no such host is known" in _refusal("no-such-host.invalid")


def test_grpc_speaks_only_to_who_asks_it_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    silence_grpc()
    assert os.environ["GRPC_VERBOSITY"] == "DEBUG"
    monkeypatch.delenv("GRPC_VERBOSITY")
    silence_grpc()
    assert os.environ["GRPC_VERBOSITY"] == "NONE"


def test_a_client_that_hangs_up_before_its_answer_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of that gRPC logs a traceback, in these words; its other errors are shown."""

    async def serve() -> None:
        server, _ = await start_server(cast(ClientApi, None), host="127.0.0.1", port=0)
        await server.stop(None)

    asyncio.run(serve())
    hung_up = "ExecuteBatchError raised in core by servicer method"
    log = logging.getLogger("grpc._cython.cygrpc")
    log.error("%s [%s]", hung_up, "/fed.v1.FederationService/ReportProgress")
    log.error("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
