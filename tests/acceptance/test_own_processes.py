"""A task's own code may start processes: they work, end, and nobody waits for them after a stop."""

import re
import signal
from collections.abc import Iterator

import psutil
import pytest

from tests.acceptance.federation import expect_clean_exits, start_client, start_server, verdicts
from tests.processes import Process, Scene, Server, wait_until

LOADING = "tests.loading_task:loading"
FOR_EVER_S = "3600"


@pytest.fixture(scope="module")
def waiting(module_scene: Scene) -> Iterator[Server]:
    """Give a server that waits for more clients than will come."""
    server = start_server(module_scene, "--min-clients", 9, task=LOADING)
    server.wait_for_line("waiting for clients")
    yield server
    server.signal(signal.SIGTERM)
    expect_clean_exits(server)


def expect_all_ended(process: Process, *, num_loading: int) -> None:
    """Wait for the processes that said that they load; there must be so many."""
    matches = (re.search(r"loading in process (\d+)", line) for line in process.lines)
    loading = {int(match[1]) for match in matches if match is not None}
    assert len(loading) >= num_loading
    wait_until(lambda: not any(map(is_alive, loading)), what=f"the processes {loading} to end")


def is_alive(pid: int) -> bool:
    """Whether a process goes on."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_load_train_may_start_processes_of_every_kind(scene: Scene) -> None:
    """Pools, workers of a DataLoader, programs: each has ended before training begins."""
    server = start_server(scene, "--rounds", 1, "--min-clients", 1, task=LOADING)
    client = start_client(scene, 0, server.address, task=LOADING, LOADING_BY="fork workers program")
    expect_clean_exits(server, client)
    assert verdicts(scene.history()) == [(1, 0, "COUNTED")]
    expect_all_ended(client, num_loading=5)


@pytest.mark.parametrize(
    ("client_id", "way", "number"),
    [
        (0, "fork", signal.SIGTERM),
        (1, "spawn", signal.SIGINT),
        (2, "workers", signal.SIGINT),
        (3, "program", signal.SIGTERM),
        (4, "deaf", signal.SIGINT),
    ],
)
def test_a_client_that_loads_its_data_stops(
    waiting: Server, scene: Scene, client_id: int, way: str, number: signal.Signals
) -> None:
    """At once, though loading would take an hour, with a sentence and without orphans."""
    num_loading = 1 if way in ("program", "deaf") else 2
    kept = {"LOADING_BY": way, "LOADING_S": FOR_EVER_S}
    client = start_client(scene, client_id, waiting.address, task=LOADING, **kept)
    client.wait_for_line("loading in process", times=num_loading)
    client.signal(number)
    expect_clean_exits(client)
    assert client.count_lines("stopped") == 1
    expect_all_ended(client, num_loading=num_loading)


def test_a_server_that_loads_its_data_stops(scene: Scene) -> None:
    """Before it serves anybody it ends just as well."""
    kept = {"LOADING_TEST_BY": "fork", "LOADING_S": FOR_EVER_S}
    server = start_server(scene, task=LOADING, **kept)
    server.wait_for_line("loading in process", times=2)
    server.signal(signal.SIGTERM)
    expect_clean_exits(server)
    assert server.count_lines("stopped") == 1
    expect_all_ended(server, num_loading=2)
