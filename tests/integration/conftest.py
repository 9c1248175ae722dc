"""One server for all tests that don't need one of their own; every test takes a round of it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedserver.reporting.as_json import attempt_json
from fedserver.store import Store, read_history
from tests.integration.peer import OpenRound, Peer, open_round
from tests.processes import Scene, Server

CLIENTS = (0, 1, 2)
MAX_NUM_EXAMPLES = 1000

History = Callable[[], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def server(session_scene: Scene) -> Server:
    """Give the shared server: its run never ends by itself, and no clock runs out."""
    started = session_scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 100_000, "--max-attempts", 100_000),
        *("--min-clients", len(CLIENTS), "--min-updates", 1),
        *("--stall-after", 3600, "--lease", 3600, "--max-num-examples", MAX_NUM_EXAMPLES),
    )
    started.wait_for_line("fedserver listening on")
    return started


@pytest.fixture(scope="session")
def peers(server: Server) -> Iterator[dict[int, Peer]]:
    """Give the clients that take part in the shared server's rounds."""
    connected = {client_id: Peer(server.address, client_id) for client_id in CLIENTS}
    yield connected
    for peer in connected.values():
        peer.close()


@pytest.fixture
def opened(peers: dict[int, Peer]) -> Iterator[OpenRound]:
    """Give a round nobody has delivered to yet; it is brought to its end afterwards."""
    current = open_round(peers)
    yield current
    current.settle()


@pytest.fixture
def stranger(server: Server) -> Iterator[Peer]:
    """Give a client that isn't registered yet and takes no part in rounds."""
    peer = Peer(server.address, 60, num_examples=0)
    yield peer
    peer.close()


@pytest.fixture
def history(session_scene: Scene, server: Server) -> History:
    """Give a function that reads the shared server's history beside it."""
    assert server.is_running

    def read() -> list[dict[str, Any]]:
        store = Store(session_scene.folder / "server" / "federation.sqlite", read_only=True)
        try:
            run = store.runs.latest_run()
            assert run is not None
            return [attempt_json(attempt) for attempt in read_history(store, run)]
        finally:
            store.close()

    return read
