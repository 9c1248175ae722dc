"""Transfers of a large model go on from the committed byte after whatever broke them.

60 MB by default; `FED_FAULTS_WIDTH=10000` makes it 400 MB, as scripts/faults does.
"""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.faults.aftermath import (
    History,
    conclude,
    expect_same_models,
    now,
)
from tests.acceptance.federation import BIG, expect_clean_exits, start_client, start_server
from tests.faulty_wire import End, Way, wire_to
from tests.processes import Process, Scene, Server, fixed_port, wait_until
from tests.tiers import FULL

WIDTH = os.environ.get("FED_FAULTS_WIDTH", "3900")
SIZE_BYTES = 4 * int(WIDTH) ** 2
"""Of the large layer, which is nearly all of the model."""
NUM_CUTS = 10
WINDOW_BYTES = 16 << 20
"""How much may be on its way, and lost with a connection."""
SMALL_BYTES = 1 << 20
"""More than everything else that goes over the wire in such a run: calls, and frames' heads."""

pytestmark = pytest.mark.timeout(900)


def large_server(scene: Scene, port: int = 0) -> Server:
    """Start the server of one round with one client and a large model."""
    return start_server(
        scene,
        *("--port", port, "--rounds", 1, "--min-clients", 1, "--require-all", "--seed", 5),
        task=BIG,
        TINY_BIG_WIDTH=WIDTH,
    )


def large_client(scene: Scene, address: str) -> Process:
    """Start its client."""
    return start_client(scene, 0, address, task=BIG, TINY_BIG_WIDTH=WIDTH)


@pytest.fixture(scope="module")
def expected(module_scene: Scene) -> History:
    """Give the history of the same run without a fault."""
    server = large_server(module_scene)
    expect_clean_exits(server, large_client(module_scene, server.address))
    return module_scene.history()


def arriving(scene: Scene, way: Way) -> int:
    """Return how much of the model or the update is committed where it goes; 0 before and after."""
    folders = {Way.UP: scene.folder / "server" / "spool", Way.DOWN: blobs_of(scene)}
    for path in folders[way].glob("*.part" if way is Way.DOWN else "*"):
        try:
            return path.stat().st_size
        except FileNotFoundError:
            continue  # whole by now, or counted and dropped
    return 0


def blobs_of(scene: Scene) -> Path:
    """Return where the client keeps models."""
    return scene.folder / "client-0" / "blobs"


@contextmanager
def watching(scene: Scene, way: Way) -> Iterator[list[int]]:
    """Note how much is committed, again and again, each value that differs from the last value."""
    seen = [0]
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.002):
            if (length := arriving(scene, way)) != seen[-1]:
                seen.append(length)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()


def expect_growth(lengths: list[int]) -> None:
    """Committed bytes stay: the length falls only once, to nothing, when all is there."""
    grown = lengths[:-1] if lengths[-1] == 0 else lengths
    assert grown == sorted(grown)
    assert grown[-1] > 0


@pytest.mark.parametrize("way", [Way.DOWN, Way.UP], ids=["download", "upload"])
def test_ten_cuts_send_no_committed_byte_again(scene: Scene, way: Way, expected: History) -> None:
    """Each cut costs at most what was on its way; the model is the same.

    A transfer that began anew would send the sum of the ten offsets more, some four times the size.
    """
    rng = random.Random(f"cuts {way.name}")
    offsets = sorted(rng.sample(range(int(0.85 * SIZE_BYTES)), NUM_CUTS))
    server = large_server(scene)
    wire = wire_to(scene, server.address)
    with watching(scene, way) as lengths:
        wire.cut(way, after_bytes=offsets[0])
        client = large_client(scene, wire.address)
        for offset in offsets[1:]:
            wire.wait_until_struck(way)
            wire.cut(way, after_bytes=max(1, offset - arriving(scene, way)))
        wire.wait_until_struck(way)
        struck_at = now()
        expect_clean_exits(server, client)
    expect_growth(lengths)
    sent_again = wire.passed_bytes(way) - expected_bytes(scene)
    assert sent_again < NUM_CUTS * WINDOW_BYTES + SMALL_BYTES
    expect_same_models(scene.history(), expected)
    name = "download" if way is Way.DOWN else "upload"
    conclude(
        scene,
        fault=f"connection reset {NUM_CUTS} times in the {name} of {SIZE_BYTES / 1e6:.0f} MB",
        struck_at=struck_at,
        seen=[f"{max(0, sent_again) / 1e6:.1f} MB sent again"],
    )


def expected_bytes(scene: Scene) -> int:
    """Return the size of the model, which is that of the update."""
    return (scene.folder / "server" / "model.safetensors").stat().st_size


@FULL
@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("way", [Way.DOWN, Way.UP], ids=["download", "upload"])
def test_a_transfer_goes_on_after_kill_9(
    scene: Scene, way: Way, who: str, expected: History
) -> None:
    """Killed in its middle, either side goes on from the committed byte with the same command."""
    rng = random.Random(f"kill {way.name} {who}")
    port = fixed_port()
    server = large_server(scene, port)
    wire = wire_to(scene, server.address)
    wire.hold(way, after_bytes=rng.randint(SIZE_BYTES // 10, SIZE_BYTES - (1 << 20)))
    client = large_client(scene, wire.address)
    wire.wait_until_held(way)
    wait_until(lambda: arriving(scene, way) > 0, what="the first byte to be written")
    (server if who == "server" else client).kill()
    struck_at = now()
    if who == "server":
        # What was on its way still arrives, and then the client hears of the end.
        wire.release()
        client.wait_for_line("no answer from")
    committed = arriving(scene, way)
    assert 0 < committed < SIZE_BYTES, "the kill landed outside the transfer"

    num_links = len(wire.links)
    if who == "server":
        server = large_server(scene, port)
    else:
        wire.release()
        client = large_client(scene, wire.address)
    expect_clean_exits(server, client)
    sent_after = wire.passed_bytes(way, since_link=num_links)
    assert sent_after < expected_bytes(scene) - committed + SMALL_BYTES
    expect_same_models(scene.history(), expected)
    name = "download" if way is Way.DOWN else "upload"
    conclude(
        scene,
        fault=f"kill -9 of the {who} in the {name} of {SIZE_BYTES / 1e6:.0f} MB",
        struck_at=struck_at,
        seen=[f"went on from byte {committed}"],
    )


@FULL
def test_an_upload_whose_end_the_server_never_hears_of_is_fenced(
    scene: Scene, expected: History
) -> None:
    """The client comes back on a new connection while its old stream is still open."""
    server = large_server(scene)
    wire = wire_to(scene, server.address)
    wire.hold(Way.UP, after_bytes=SIZE_BYTES // 2)
    client = large_client(scene, wire.address)
    wire.wait_until_held(Way.UP)
    wire.leave_hanging(End.SERVER)
    struck_at = now()
    wire.release()
    expect_clean_exits(server, client)
    expect_same_models(scene.history(), expected)
    conclude(scene, fault="half-open: the server never hears of the end", struck_at=struck_at)
