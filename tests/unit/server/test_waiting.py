"""What a client that waits for an order says it waits for."""

import logging
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
from fedrounds.wire.pb import federation_pb2 as pb
from fedrounds.wire.pb.federation_pb2_grpc import (
    FederationServiceServicer,
    add_FederationServiceServicer_to_server,
)

TASK = "tests.tiny_task:tiny"


def wait(**waiting: int) -> pb.PullWorkResponse:
    """Return an answer that there is no order yet, and why."""
    return pb.PullWorkResponse(state=pb.WORK_STATE_WAIT, waiting=pb.Waiting(**waiting))


class PatientServer(FederationServiceServicer):
    """A run that has no order, whose pulls get these answers."""

    def __init__(self, answers: list[pb.PullWorkResponse]) -> None:
        self._answers = iter(answers)
        self.waits_s: list[int] = []

    def Register(self, _: pb.RegisterRequest, __: object) -> pb.RegisterResponse:  # noqa: N802
        """Open a session for anybody."""
        answer = pb.RegisterResponse(session_id="session", run_id="run1-abc", task=TASK)
        answer.partitioning.CopyFrom(pb.Partitioning(scheme="iid", num_partitions=10))
        answer.max_wait.seconds = 20
        return answer

    def PullWork(self, request: pb.PullWorkRequest, _: object) -> pb.PullWorkResponse:  # noqa: N802
        """Give the next answer."""
        self.waits_s.append(request.wait.seconds)
        return next(self._answers)


@contextmanager
def serving(patient: PatientServer) -> Iterator[Connection]:
    """Give a connection to this server."""
    server = grpc.server(ThreadPoolExecutor(1))
    add_FederationServiceServicer_to_server(patient, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection = Connection(Route(server=f"127.0.0.1:{port}"))
    try:
        yield connection
    finally:
        connection.close()
        server.stop(None)


def test_a_client_says_once_what_it_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Soon, and again only when it waits for something else; an older server says nothing."""
    caplog.set_level(logging.INFO, logger="fedclient.loop")
    patient = PatientServer(  # type: ignore[abstract]  # what it doesn't have isn't called
        [
            wait(clients_here=1, clients_needed=3),
            wait(clients_here=2, clients_needed=3),
            wait(round=4),
            wait(round=5),
            wait(),
            pb.PullWorkResponse(state=pb.WORK_STATE_WAIT),
            pb.PullWorkResponse(state=pb.WORK_STATE_FINISHED, outcome=pb.RUN_OUTCOME_FINISHED),
        ]
    )
    stop, settings = threading.Event(), parse(ClientSettings, ["--id", "0", "--task", TASK])
    with serving(patient) as connection:
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
    assert caplog.messages[1:] == [
        "client 0 has 32 examples; waiting for the first order",
        "waiting for clients: 1 of the 3 that a round needs are here",
        "round 4 is running; waiting for an order",
        "waiting for the next round to open",
        "the run is done",
    ]
    assert patient.waits_s == [1, *[20] * 6]
