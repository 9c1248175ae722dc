"""A client whose server names things that would become files outside of its folder."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from fedclient.connection import Connection
from shared.errors import WrongSettings
from shared.pb import federation_pb2 as pb


@contextmanager
def connected(order: pb.WorkOrder) -> Iterator[Connection]:
    """Give a connection to a server that has this order for everybody."""

    def pull_work(_: pb.PullWorkRequest, __: object) -> pb.PullWorkResponse:
        return pb.PullWorkResponse(state=pb.WORK_STATE_ORDER, order=order)

    handler = grpc.unary_unary_rpc_method_handler(
        pull_work,
        request_deserializer=pb.PullWorkRequest.FromString,
        response_serializer=pb.PullWorkResponse.SerializeToString,
    )
    name = pb.DESCRIPTOR.services_by_name["FederationService"].full_name
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(name, {"PullWork": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection = Connection(f"127.0.0.1:{port}")
    try:
        yield connection
    finally:
        connection.close()
        server.stop(None)


def an_order(
    *, digest: str = "a" * 64, order_id: str = "run1-abc-r1-a1-c0-s1", last: str = ""
) -> pb.WorkOrder:
    """Return an order, harmless by default."""
    sections = [pb.Section(name="model", digest=digest, size_bytes=10)]
    return pb.WorkOrder(
        order_id=order_id, round=1, attempt=1, sections=sections, last_counted_order_id=last
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "/home/somebody/thesis.tex"},
        {"digest": "../" + "a" * 61},
        {"digest": ""},
        {"order_id": "../../.ssh/authorized_keys"},
        {"order_id": ""},
        {"last": "a/b"},
    ],
    ids=str,
)
def test_no_order_names_a_file_elsewhere(changes: dict[str, str]) -> None:
    """It is refused before anything is looked for, made or deleted under its name."""
    with connected(an_order()) as connection:
        assert connection.pull_work("session", wait_s=0).order is not None
    with connected(an_order(**changes)) as connection, pytest.raises(WrongSettings, match="order"):
        connection.pull_work("session", wait_s=0)
