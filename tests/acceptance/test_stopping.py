"""SIGINT and SIGTERM: both sides end cleanly, whatever is under way, and go on later."""

import signal
import socket

import psutil
import pytest

from tests.acceptance.federation import (
    BIG,
    expect_clean_exits,
    start_client,
    start_server,
    verdicts,
)
from tests.faulty_wire import Way, wire_to
from tests.processes import Process, Scene, Server, fixed_port, wait_until


def stop(process: Process, number: signal.Signals) -> None:
    """Ask a process to end a thousand times a second until it has; it must, once, cleanly.

    Asked without a pause it might never end: gRPC sleeps anew after each signal, for what was left.
    """
    process.signal(number)
    while not process.has_ended(within_s=0.001):
        process.signal(number)
    expect_clean_exits(process)
    assert process.count_lines("the same command goes on") == 1


def test_stopped_while_training_and_while_parked_both_sides_end_and_go_on(scene: Scene) -> None:
    """A stop loses nothing: server and clients started again finish the run, nothing twice."""
    port, num_rounds = fixed_port(), 10

    def server_again() -> Server:
        return start_server(scene, "--port", port, "--rounds", num_rounds, "--require-all")

    server = server_again()
    training = start_client(scene, 0, server.address, TINY_STEP_S="1", TINY_TRACE="1")
    parked = start_client(scene, 1, server.address)
    parked.wait_for_line("update stored")
    training.wait_for_line("tiny-step 2$")
    # One client has a parked call at the server, the other reports its progress to it.
    stop(server, signal.SIGTERM)
    parked.wait_for_line("no answer from")
    server = server_again()
    parked.wait_for_line("answers again")
    training.wait_for_line("tiny-step", times=training.count_lines("tiny-step") + 1)
    stop(training, signal.SIGTERM)
    stop(parked, signal.SIGINT)
    orders = {order["client"]: order["state"] for order in scene.history()[-1]["orders"]}
    assert orders[0] == "OPEN"

    clients = [start_client(scene, client_id, server.address) for client_id in (0, 1)]
    expect_clean_exits(server, *clients)
    assert verdicts(scene.history()) == [
        (number, client, "COUNTED") for number in range(1, num_rounds + 1) for client in (0, 1)
    ]


def test_stopped_in_the_middle_of_an_upload_both_sides_end_and_go_on(scene: Scene) -> None:
    """An upload on the wire holds up neither side's end, and is finished later."""
    port = fixed_port()

    def server_again() -> Server:
        flags = ("--port", port, "--rounds", 1, "--min-clients", 1)
        return start_server(scene, *flags, task=BIG)

    server = server_again()
    wire = wire_to(scene, server.address)

    def client_again() -> Process:
        return start_client(scene, 0, wire.address, task=BIG)

    wire.hold(Way.UP, after_bytes=5_000_000)
    client = client_again()
    wire.wait_until_held(Way.UP)
    stop(client, signal.SIGINT)

    wire.hold(Way.UP, after_bytes=5_000_000)
    client = client_again()
    wire.wait_until_held(Way.UP)
    stop(server, signal.SIGTERM)
    wire.release()
    server = server_again()
    expect_clean_exits(server, client)
    assert verdicts(scene.history()) == [(1, 0, "COUNTED")]
    # The tests' servers are started with --no-summary.
    assert server.count_lines("the final model is in") == 1
    assert server.count_lines("counted +accuracy") == 0
    assert not (scene.folder / "server" / "curve.png").exists()


def test_a_server_that_waits_for_clients_stops_too(scene: Scene) -> None:
    """Before the first round there is nothing to wait for."""
    server = start_server(scene)
    server.wait_for_line("waiting for clients")
    stop(server, signal.SIGINT)


def test_the_end_is_shown_when_nobody_is_served_any_more(scene: Scene) -> None:
    """However long that takes, no clock that still runs may take it for an absence."""
    server = start_server(scene, "--rounds", 1, "--min-clients", 1, FEDSERVER_SUMMARY="true")
    client = start_client(scene, 0, server.address)
    host, _, port = server.address.rpartition(":")
    showing: list[psutil.Process] = []

    def is_shown() -> bool:
        children = psutil.Process(server.pid).children()
        showing[:] = [child for child in children if "history" in child.cmdline()]
        return bool(showing)

    wait_until(is_shown, what="the table of rounds to be printed")
    showing[0].suspend()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
    showing[0].resume()
    expect_clean_exits(server, client)
    assert server.count_lines("counted +accuracy") == 1
