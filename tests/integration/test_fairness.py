"""One client's streams, however many, don't fill the disk and hold nobody else up."""

import queue
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import grpc

from fedrounds.tensors.codec import digest_bytes
from fedrounds.wire.pb import federation_pb2 as pb
from tests.acceptance.federation import BIG
from tests.integration.peer import (
    OpenRound,
    Peer,
    changed,
    expect_status,
    open_round,
    payload_of,
)
from tests.processes import GENEROUS_S, Scene, wait_until

HALF = 1000
"""Bytes; the tiny model has some 2,000."""

NUM_UPLOADS = 16
"""How many slots the server has for uploads."""

NUM_DOWNLOADS = 32
"""How many slots it has for downloads."""


def test_all_streams_of_one_order_hold_one_slot(opened: OpenRound) -> None:
    """A newer one ends the older one whatever it brings, and though nothing comes from that."""
    peer, order = opened.peers[0], opened.orders[0]
    streams = []
    for number in range(NUM_UPLOADS + 1):
        payload = payload_of(changed(opened.base, 0.001 * number))
        streams.append(peer.stream(order, payload))
        streams[-1].send(payload[:1])
        streams[-1].wait_until_committed(1)
    assert opened.settle(1) == [pb.RECEIPT_STORED]
    *older, newest = streams
    for stream in older:
        expect_status(grpc.StatusCode.ABORTED, stream.result, match="a newer upload")
    newest.send(payload[1:])
    assert newest.finish().receipt == pb.RECEIPT_STORED


def test_an_order_that_has_its_update_keeps_no_other_bytes(
    session_scene: Scene, opened: OpenRound
) -> None:
    """What streams of other updates brought before and might bring afterwards goes."""
    peer, order = opened.peers[0], opened.orders[0]
    good, *others = (payload_of(changed(opened.base, 0.01 * number)) for number in range(4))
    streams = []
    for payload in (good, *others):
        streams.append(peer.stream(order, payload))
        streams[-1].send(payload[:HALF])
        streams[-1].wait_until_committed(HALF)
        for older in streams[:-1]:
            expect_status(grpc.StatusCode.ABORTED, older.result)
    offset = peer.query(order, good).committed_bytes
    assert peer.upload(order, good, offset=offset).receipt == pb.RECEIPT_STORED
    for stream, payload in zip(streams[1:], others, strict=True):
        stream.send(payload[HALF:-1])
        expect_status(grpc.StatusCode.ABORTED, stream.finish)
    files = list((session_scene.folder / "server/spool").glob(f"{order.order_id}.*"))
    assert [file.name for file in files] == [f"{order.order_id}.{digest_bytes(good)}"]


def test_a_stream_ends_with_its_order(session_scene: Scene, opened: OpenRound) -> None:
    """The next bytes that come of it are taken no more, and the answer is the order's."""
    spool = session_scene.folder / "server/spool"
    # The server tidies the round before while this round goes on, and whatever ended orders left is
    # deleted then.
    wait_until(lambda: not any(spool.iterdir()), what="the updates of the round before to go")
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    upload = peer.stream(order, payload)
    upload.send(payload[:HALF])
    upload.wait_until_committed(HALF)
    assert peer.report(order, gave_up=True) == pb.DIRECTIVE_ABANDON
    upload.send(payload[HALF:-1])
    assert upload.result().receipt == pb.RECEIPT_LATE
    (left,) = spool.glob(f"{order.order_id}.*")
    assert left.stat().st_size == HALF


def test_an_upload_that_gets_its_slot_after_its_order_has_ended_frees_it_at_once(
    scene: Scene,
) -> None:
    """Though nothing comes from it: others have waited behind it."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1, "--min-clients", 3),
        *("--min-updates", 1, "--max-uploads", 1, "--stall-after", 3600, "--lease", 3600),
    )
    opened = open_round({client_id: Peer(server.address, client_id) for client_id in (0, 1, 2)})
    payload = payload_of(changed(opened.base))
    first = opened.peers[0].stream(opened.orders[0], payload)
    first.send(payload[:HALF])
    first.wait_until_committed(HALF)
    silent = opened.peers[1].stream_in_line(opened.orders[1], payload)
    last = opened.peers[2].stream_in_line(opened.orders[2], payload)
    assert opened.peers[1].report(opened.orders[1], gave_up=True) == pb.DIRECTIVE_ABANDON
    first.send(payload[HALF:])
    assert first.finish().receipt == pb.RECEIPT_STORED
    assert silent.result().receipt == pb.RECEIPT_LATE
    last.send(payload)
    assert last.finish().receipt == pb.RECEIPT_STORED
    for peer in opened.peers.values():
        peer.close()


def test_an_upload_nothing_comes_from_is_sent_away_before_it_says_whose_it_is(
    stranger: Peer,
) -> None:
    """Nobody keeps streams at the server without so much as a session."""
    silence: queue.Queue[pb.UploadUpdateRequest | None] = queue.Queue()
    expect_status(
        grpc.StatusCode.UNAVAILABLE,
        partial(stranger.stub.UploadUpdate, iter(silence.get, None), timeout=GENEROUS_S),
        match="send the header first",
    )
    silence.put(None)


Download = Iterator[pb.DownloadBlobResponse]


def begin_downloads(peer: Peer, digest: str, *session_ids: str) -> Sequence[Download]:
    """Begin a download for each of these sessions, from which nothing is read yet."""
    calls = [
        peer.stub.DownloadBlob(pb.DownloadBlobRequest(session_id=session_id, digest=digest))
        for session_id in session_ids
    ]
    for call in calls:
        # It comes before the slot is asked for.
        call.initial_metadata()
    return calls


def status_of(download: Download) -> grpc.StatusCode:
    """Return how a download ends, once it is read to its end."""
    try:
        for _ in download:
            pass
    except grpc.RpcError as error:
        return cast(grpc.Call, error).code()
    return grpc.StatusCode.OK


def test_a_session_has_two_downloads_at_a_time(scene: Scene) -> None:
    """A third ends the first; however many it begins, there are slots for others."""
    server = scene.server(
        *("--task", BIG, "--rounds", 9, "--min-clients", 2),
        *("--stall-after", 3600, "--lease", 3600),
    )
    greedy, other = (Peer(server.address, client_id) for client_id in (0, 1))
    section = greedy.pull_order().sections[0]
    sessions = [greedy.session_id] * (2 * NUM_DOWNLOADS)
    begun = begin_downloads(greedy, section.digest, *sessions)
    assert len(other.download(section.digest)) == section.size_bytes
    assert Counter(map(status_of, begun)) == {
        grpc.StatusCode.ABORTED: len(begun) - 2,
        grpc.StatusCode.OK: 2,
    }
    greedy.close()
    other.close()


def test_a_client_that_waits_for_its_download_to_begin_is_not_late(scene: Scene) -> None:
    """Two times after each other all slots are taken, each time for as long as patience lasts."""
    server = scene.server(
        *("--task", BIG, "--rounds", 9, "--min-clients", 2),
        *("--min-updates", 1, "--stall-after", 2, "--lease", 3600),
    )
    first, second = (Peer(server.address, client_id) for client_id in (0, 1))
    digest = first.pull_order().sections[0].digest
    sessions = [
        first.register(client_ids=[client_id], instance_key=f"idle-{client_id}").session_id
        for client_id in range(2, 2 + NUM_DOWNLOADS)
    ]
    begun = begin_downloads(first, digest, *sessions, *sessions)
    # Only now its clock begins.
    order = second.pull_order()
    assert len(second.download(digest)) == order.sections[0].size_bytes
    assert second.report(order) == pb.DIRECTIVE_CONTINUE
    assert set(map(status_of, begun)) == {grpc.StatusCode.UNAVAILABLE}
    first.close()
    second.close()
