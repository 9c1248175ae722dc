"""A client whose server means ill: what it names, what it says, whose orders it gives."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from fedclient.client_data import ClientData
from fedclient.connection import Connection
from fedclient.loop import take_part
from fedclient.routes import Route
from fedclient.session import Patience
from fedclient.settings import ClientSettings
from fedclient.terminal import Screen
from fedrounds.cli import parse
from fedrounds.errors import InvalidInput, WrongSettings
from fedrounds.types import Counters, Receipt
from fedrounds.wire.pb import federation_pb2 as pb
from fedrounds.wire.pb.federation_pb2_grpc import (
    FederationServiceServicer,
    add_FederationServiceServicer_to_server,
)
from tests.factories import make_update

TASK = "tests.tiny_task:tiny"
ILL = "bad\n2026-11-25 12:00:00 INFO all is well \x1b[2J" + "!" * 2000
SHOWN = r"bad\n2026-11-25 12:00:00 INFO all is well \x1b[2J!!"


class IllServer(FederationServiceServicer):
    """Has one run and one order for everybody, and a text for whoever reports or uploads."""

    def __init__(self, order: pb.WorkOrder) -> None:
        self._order = order

    def Register(self, _: pb.RegisterRequest, __: object) -> pb.RegisterResponse:  # noqa: N802
        """Open a session for anybody."""
        return pb.RegisterResponse(
            session_id="session",
            run_id="run1-abc",
            task=TASK,
            partitioning=pb.Partitioning(scheme="iid", num_partitions=10),
        )

    def PullWork(self, _: pb.PullWorkRequest, __: object) -> pb.PullWorkResponse:  # noqa: N802
        """Give the order."""
        return pb.PullWorkResponse(state=pb.WORK_STATE_ORDER, order=self._order)

    def ReportProgress(  # noqa: N802
        self, _: pb.ReportProgressRequest, context: grpc.ServicerContext
    ) -> pb.ReportProgressResponse:
        """Answer with a status."""
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, ILL)

    def UploadUpdate(  # noqa: N802
        self, _: Iterator[pb.UploadUpdateRequest], __: object
    ) -> pb.UploadUpdateResponse:
        """Refuse."""
        return pb.UploadUpdateResponse(receipt=pb.RECEIPT_REFUSED, reason=ILL)


@contextmanager
def connected(order: pb.WorkOrder) -> Iterator[Connection]:
    """Give a connection to a server that has this order for everybody."""
    server = grpc.server(ThreadPoolExecutor(1))
    # What it doesn't have answers UNIMPLEMENTED.
    ill = IllServer(order)  # type: ignore[abstract]
    add_FederationServiceServicer_to_server(ill, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection = Connection(Route(server=f"127.0.0.1:{port}"))
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


def test_a_time_that_no_clock_can_hold_is_refused() -> None:
    """With a sentence, where an order's deadline is 2^62 seconds."""
    order = an_order()
    order.training.work_deadline.seconds = 2**62
    with (
        connected(order) as connection,
        pytest.raises(WrongSettings, match=r"answer can't be right: Duration\.seconds is 46116"),
    ):
        connection.pull_work("session", wait_s=0)


def test_an_order_for_somebody_else_is_refused(tmp_path: Path) -> None:
    """Nothing is looked for, made or forgotten in the name of a client that isn't here."""
    argv = ["--ids", "0-3", "--task", TASK]
    order = an_order()
    order.client_id = 7
    stop, settings = threading.Event(), parse(ClientSettings, argv)
    with (
        connected(order) as connection,
        pytest.raises(WrongSettings, match="is for client 7, which this process doesn't serve"),
    ):
        take_part(
            settings,
            state_dir=tmp_path,
            connection=connection,
            patience=Patience(server=settings.server, stop=stop),
            client_data=ClientData(settings),
            screen=Screen(),
            stop=stop,
            when_stopped=lambda _: None,
        )
    assert not (tmp_path / "states").exists()


def test_what_the_server_says_is_fit_for_a_terminal_and_a_log(tmp_path: Path) -> None:
    """An error's text and a refusal's reason: escaped, and no longer than a line may be."""
    payload = tmp_path / "payload"
    payload.write_bytes(b"x")
    with connected(an_order()) as connection:
        with pytest.raises(InvalidInput) as error:
            connection.report_progress("session", "order", counters=Counters())
        answer = connection.upload(
            "session", make_update(), payload, offset=0, on_sent=lambda _: None
        )
    assert answer.receipt is Receipt.REFUSED
    for text in (str(error.value), answer.reason):
        assert text.startswith(SHOWN)
        assert len(text) == 1000
