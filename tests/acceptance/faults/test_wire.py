"""A network that breaks between one client and the server; the other clients' network is good."""

import random
import signal
import time

import pytest

from fedrounds.failpoints import VARIABLE, FailPoint
from tests.acceptance.conftest import CLIENTS, Undisturbed, run_flags
from tests.acceptance.faults.aftermath import conclude, expect_same_models, now
from tests.acceptance.federation import (
    BIG,
    TINY,
    expect_clean_exits,
    incident_kinds,
    start_client,
    start_server,
)
from tests.faulty_wire import PIECE_BYTES, End, FaultyWire, Way, wire_to
from tests.processes import Process, Scene, Server, wait_until
from tests.tiers import FULL

VICTIM = 0
SIZE_BYTES = 27_000_000
"""Of the big model, a little less than it has."""

STALL_S = 15
"""More than a client takes for its first training step on a busy machine."""
SLOW_S = 3 * STALL_S
"""Of a transfer that is slow."""

ONE_ROUND = ("--rounds", 1)
"""Given after the flags of the undisturbed run: it has the same first round."""


def start_behind_wire(
    scene: Scene, server: Server, wire: FaultyWire, *, task: str = BIG
) -> list[Process]:
    """Start all clients, the first of them behind the wire."""
    return [
        start_client(
            scene, client_id, wire.address if client_id == VICTIM else server.address, task=task
        )
        for client_id in CLIENTS
    ]


def way_name(way: Way) -> str:
    """Return which transfer goes this way."""
    return "upload" if way is Way.UP else "download"


@FULL
@pytest.mark.parametrize("fault", ["slow writer", "slow reader", "delay"])
def test_slow_is_not_late(scene: Scene, fault: str, undisturbed: Undisturbed) -> None:
    """Who gets further is waited for, though the transfer takes far longer than --stall-after."""
    flags = ("--rounds", 1, "--min-clients", 3, "--seed", 5, "--stall-after", STALL_S)
    server = start_server(scene, *flags, task=BIG)
    wire = wire_to(scene, server.address)
    struck_at = now()
    match fault:
        case "slow writer":
            wire.slow_down(bytes_per_s={Way.UP: SIZE_BYTES / SLOW_S})
        case "slow reader":
            wire.slow_down(bytes_per_s={Way.DOWN: SIZE_BYTES / SLOW_S})
        case "delay":
            wire.slow_down(delay_s=SLOW_S * PIECE_BYTES / SIZE_BYTES)
    clients = start_behind_wire(scene, server, wire)
    expect_clean_exits(server, *clients)
    assert incident_kinds(scene.history()) == []
    expect_same_models(scene.history(), undisturbed(BIG).history)
    conclude(scene, fault=fault, struck_at=struck_at, client_id=VICTIM)


@FULL
@pytest.mark.parametrize("way", Way, ids=way_name)
def test_a_flipped_bit_is_found_and_the_payload_sent_again(
    scene: Scene, way: Way, undisturbed: Undisturbed
) -> None:
    """No model rests on a byte that changed on the wire."""
    server = start_server(scene, *run_flags(BIG, 0), *ONE_ROUND, task=BIG)
    wire = wire_to(scene, server.address)
    rng = random.Random(f"flip {way.name}")
    wire.flip(way, after_bytes=rng.randint(SIZE_BYTES // 10, SIZE_BYTES))
    clients = start_behind_wire(scene, server, wire)
    wire.wait_until_struck(way)
    struck_at = now()
    # A bit of what HTTP/2 or gRPC add, one byte in a thousand, breaks the connection in its place.
    pattern = "the bytes don't match digest|arrived with other bytes|no answer from"
    line = clients[VICTIM].wait_for_line(pattern)
    expect_clean_exits(server, *clients)
    expect_same_models(scene.history(), undisturbed(BIG).history)
    conclude(
        scene,
        fault=f"a bit flipped in the {way_name(way)}",
        struck_at=struck_at,
        seen=["dropped and sent again" if "bytes" in line else "connection broken"],
        client_id=VICTIM,
    )


@FULL
def test_a_lost_receipt_is_asked_for_again(scene: Scene, undisturbed: Undisturbed) -> None:
    """The server has recorded the update; the client learns of it on its next connection."""
    # Halted with the third update on the disk, so that the way back can be closed in between.
    armed = {VARIABLE: f"{FailPoint.UPDATE_DURABLE}:halt:{len(CLIENTS)}"}
    server = start_server(scene, *run_flags(BIG, 0), *ONE_ROUND, task=BIG, **armed)
    wire = wire_to(scene, server.address)
    wire.hold(Way.UP, after_bytes=SIZE_BYTES // 2)
    clients = start_behind_wire(scene, server, wire)
    wire.wait_until_held(Way.UP)
    server.wait_for_line("update-stored", times=len(CLIENTS) - 1)
    wire.release()
    wait_until(lambda: server.is_halted, what="the server to be halted")
    wire.hold(Way.DOWN)
    server.signal(signal.SIGCONT)
    server.wait_for_line(f"update-stored round=1 client={VICTIM} ")
    wire.leave_hanging(End.SERVER)
    struck_at = now()
    wire.release()
    clients[VICTIM].wait_for_line("update duplicate")
    expect_clean_exits(server, *clients)
    expect_same_models(scene.history(), undisturbed(BIG).history)
    conclude(
        scene,
        fault="connection gone between an update and its receipt",
        struck_at=struck_at,
        seen=["update duplicate"],
    )


@FULL
@pytest.mark.parametrize("way", Way, ids=way_name)
def test_a_silence_that_ends_by_itself(scene: Scene, way: Way, undisturbed: Undisturbed) -> None:
    """Nothing goes either way for as long as the others take: the transfer simply goes on."""
    server = start_server(scene, *run_flags(BIG, 0), *ONE_ROUND, task=BIG)
    wire = wire_to(scene, server.address)
    wire.hold(way, after_bytes=SIZE_BYTES // 2)
    clients = start_behind_wire(scene, server, wire)
    wire.wait_until_held(way)
    wire.hold(*Way)
    server.wait_for_line("update-stored", times=len(CLIENTS) - 1)
    struck_at = now()
    wire.release()
    expect_clean_exits(server, *clients)
    expect_same_models(scene.history(), undisturbed(BIG).history)
    conclude(
        scene,
        fault=f"black hole in the {way_name(way)}, for a while",
        struck_at=struck_at,
        client_id=VICTIM,
    )


@FULL
@pytest.mark.parametrize("kind", ["black hole", "half-open: the client never hears of the end"])
@pytest.mark.parametrize("way", Way, ids=way_name)
def test_a_silence_that_is_noticed(
    scene: Scene, way: Way, kind: str, undisturbed: Undisturbed
) -> None:
    """Pings without an answer end the connection; the transfer goes on over another connection."""
    server = start_server(scene, *run_flags(BIG, 0), *ONE_ROUND, task=BIG)
    wire = wire_to(scene, server.address)
    wire.hold(way, after_bytes=SIZE_BYTES // 2)
    clients = start_behind_wire(scene, server, wire)
    wire.wait_until_held(way)
    if kind == "black hole":
        wire.hold(*Way)
    else:
        wire.leave_hanging(End.CLIENT)
    clients[VICTIM].wait_for_line("no answer from")
    struck_at = now()
    wire.release()
    expect_clean_exits(server, *clients)
    expect_same_models(scene.history(), undisturbed(BIG).history)
    conclude(
        scene,
        fault=f"{kind}, in the {way_name(way)}",
        struck_at=struck_at,
        seen=["the client noticed"],
        client_id=VICTIM,
    )


@FULL
@pytest.mark.parametrize("way", Way, ids=way_name)
def test_only_one_way_is_silent(scene: Scene, way: Way, undisturbed: Undisturbed) -> None:
    """In the middle of an upload one way passes nothing, the other everything.

    With nothing coming back, an upload stops too: the server's windows aren't heard of.
    """
    server = start_server(scene, *run_flags(BIG, 0), *ONE_ROUND, task=BIG)
    wire = wire_to(scene, server.address)
    wire.hold(Way.UP, after_bytes=SIZE_BYTES // 2)
    clients = start_behind_wire(scene, server, wire)
    wire.wait_until_held(Way.UP)
    wire.hold(way)
    if way is Way.DOWN:
        wire.release(Way.UP)
    clients[VICTIM].wait_for_line("no answer from")
    struck_at = now()
    wire.release()
    expect_clean_exits(server, *clients)
    expect_same_models(scene.history(), undisturbed(BIG).history)
    direction = "to the server" if way is Way.UP else "to the client"
    conclude(
        scene,
        fault=f"black hole {direction} alone, in the upload",
        struck_at=struck_at,
        seen=["the client noticed"],
        client_id=VICTIM,
    )


def test_a_line_that_breaks_all_the_time(scene: Scene, undisturbed: Undisturbed) -> None:
    """Twelve resets at random bytes of the calls themselves: registering, pulling, reporting."""
    server = start_server(scene, *run_flags(TINY, 0))
    wire = wire_to(scene, server.address)
    rng = random.Random("line")
    # The models alone are 12,000 bytes each way: all of these strike before the run is over.
    moments = [(way, rng.randint(1, 1500)) for _ in range(6) for way in Way]
    clients = start_behind_wire(scene, server, wire, task=TINY)
    for way, after_bytes in moments:
        wire.cut(way, after_bytes=after_bytes)
        wire.wait_until_struck(way)
        struck_at = now()
    expect_clean_exits(server, *clients)
    expect_same_models(scene.history(), undisturbed(TINY).history)
    conclude(
        scene,
        fault=f"connection reset {len(moments)} times at random bytes of a small run",
        struck_at=struck_at,
        client_id=VICTIM,
    )


NOTICED_S = 45
"""30 s, and half as much again for a busy machine; without the pings' own timeout it takes 60 s."""


@FULL
def test_connections_that_go_silent_are_left_within_30_s(
    scene: Scene, undisturbed: Undisturbed
) -> None:
    """One client is parked, one downloads, one uploads; new connections work, nothing is lost."""
    server = start_server(scene, *run_flags(BIG, 0), *ONE_ROUND, task=BIG)
    wires = [wire_to(scene, server.address) for _ in CLIENTS]
    _, downloading, uploading = wires
    downloading.hold(Way.DOWN, after_bytes=SIZE_BYTES // 2)
    uploading.hold(Way.UP, after_bytes=SIZE_BYTES // 2)
    clients = [
        start_client(scene, client_id, wire.address, task=BIG)
        for client_id, wire in zip(CLIENTS, wires, strict=True)
    ]
    server.wait_for_line(f"update-stored round=1 client={CLIENTS[0]} ")
    downloading.wait_until_held(Way.DOWN)
    uploading.wait_until_held(Way.UP)
    struck_at, began = now(), time.monotonic()
    silenced = {wire: wire.silence() for wire in wires}
    for wire, links in silenced.items():
        wire.release()
        wire.wait_until_left(links)
    taken_s = {
        end: max(link.left_at[end] - began for links in silenced.values() for link in links)
        for end in End
    }
    assert max(taken_s.values()) < NOTICED_S, taken_s
    expect_clean_exits(server, *clients)
    expect_same_models(scene.history(), undisturbed(BIG).history)
    conclude(
        scene,
        fault="connections that go silent: parked, in the download, in the upload",
        struck_at=struck_at,
        seen=[f"{end.name.lower()} left after {taken_s[end]:.0f} s" for end in End],
    )
