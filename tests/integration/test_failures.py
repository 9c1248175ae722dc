"""What the server doesn't foresee: no file can be opened, a folder of its own is gone."""

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import grpc
import psutil

from fedrounds.failpoints import VARIABLE, FailPoint
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.peer import OpenRound, Peer, changed, expect_status, open_round, payload_of
from tests.processes import Scene, Server, wait_until


def start_round(scene: Scene, **environment: str) -> tuple[Server, OpenRound]:
    """Start a server and open its first round, with two clients."""
    started = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 2, "--min-clients", 2),
        *("--stall-after", 3600, "--lease", 3600, "--farewell", 0),
        **environment,
    )
    peers = {client_id: Peer(started.address, client_id) for client_id in (0, 1)}
    for peer in peers.values():
        scene.at_end(peer.close)
    return started, open_round(peers)


@contextmanager
def no_file_to_open(server: Server) -> Iterator[None]:
    """Leave a process the files that it has, and not one more."""
    before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    used = max(int(descriptor) for descriptor in os.listdir(f"/proc/{server.pid}/fd"))  # noqa: PTH208
    # The limit is on the descriptors' numbers; a new file takes the lowest number that is free.
    free = used + 1 - psutil.Process(server.pid).num_fds()
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + 1 - free, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)


def test_a_server_that_can_open_no_file_asks_to_come_again(scene: Scene) -> None:
    """As with a full disk: RESOURCE_EXHAUSTED, an incident, and the run goes on afterwards."""
    server, opened = start_round(scene)
    payload = payload_of(changed(opened.base))
    with no_file_to_open(server):
        for client_id, peer in opened.peers.items():
            expect_status(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                partial(peer.upload, opened.orders[client_id], payload),
                match="the server is out of files, as its log says",
            )
        assert server.is_running
    assert opened.settle() == [pb.RECEIPT_STORED] * 2
    assert open_round(opened.peers).settle() == [pb.RECEIPT_STORED] * 2
    assert server.wait() == 0
    kinds = [incident["kind"] for entry in scene.history() for incident in entry["incidents"]]
    assert kinds == ["out-of-files"]


def test_a_round_waits_until_files_can_be_opened_again(scene: Scene) -> None:
    """The round loop says so and repeats its step; what had a receipt counts."""
    server, opened = start_round(scene, **{VARIABLE: f"{FailPoint.ROUND_CLOSED}:halt"})
    assert opened.settle() == [pb.RECEIPT_STORED] * 2
    wait_until(lambda: server.is_halted, what="the server to be halted")
    with no_file_to_open(server):
        server.signal(signal.SIGCONT)
        server.wait_for_line("out-of-files")
        assert server.is_running
    assert open_round(opened.peers).settle() == [pb.RECEIPT_STORED] * 2
    assert server.wait() == 0
    assert [(entry["attempt"], entry["phase"]) for entry in scene.history()] == [(1, "DONE")] * 2


def test_an_error_nobody_foresaw_is_an_internal_error_without_detail(scene: Scene) -> None:
    """The log and the history say what it was, the peer learns only that it was the server."""
    server, opened = start_round(scene)
    spool, aside = scene.folder / "server/spool", scene.folder / "aside"
    shutil.move(spool, aside)
    spool.write_text("no folder")
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    sentence = expect_status(grpc.StatusCode.INTERNAL, lambda: peer.upload(order, payload))
    assert sentence == (
        "the server failed in UploadUpdate in a way that it doesn't foresee; its log says more, "
        "and the call may be repeated later"
    )
    server.wait_for_line("server-failed")
    assert server.is_running
    spool.unlink()
    shutil.move(aside, spool)
    assert opened.settle() == [pb.RECEIPT_STORED] * 2
    assert open_round(opened.peers).settle() == [pb.RECEIPT_STORED] * 2
    assert server.wait() == 0
    (incident,) = [incident for entry in scene.history() for incident in entry["incidents"]]
    assert (incident["kind"], incident["what"]) == ("server-failed", "UploadUpdate")
    assert incident["reason"].startswith("NotADirectoryError")


def test_what_only_a_person_can_mend_ends_the_server_and_the_run_goes_on_afterwards(
    scene: Scene,
) -> None:
    """A folder stands where the next model is written: one sentence, exit code 1, nothing lost."""
    server, opened = start_round(scene)
    obstacle = scene.folder / "server/models/aggregate.draft"
    obstacle.mkdir()
    opened.settle()
    assert server.wait() == 1
    assert server.count_lines("Traceback") == 0
    assert str(obstacle) in server.lines[-1]
    assert "start the same command again" in server.lines[-1]
    (incident,) = scene.history()[0]["incidents"]
    assert (incident["kind"], incident["what"]) == ("server-failed", "the round loop")
    obstacle.rmdir()
    again, second = start_round(scene)
    assert second.settle() == [pb.RECEIPT_STORED] * 2
    assert again.wait() == 0
    assert [(entry["attempt"], entry["phase"]) for entry in scene.history()] == [(1, "DONE")] * 2


def test_both_sides_may_open_all_the_files_that_the_system_allows(scene: Scene) -> None:
    """The soft limit becomes the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Inherited by what is started here.
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        server, _ = start_round(scene)
        client = scene.client(7, server.address, "--task", "tests.tiny_task:tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    client.wait_for_line("connecting to")
    for process in (server, client):
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
