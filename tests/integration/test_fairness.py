"""One client's streams, however many, don't fill the disk and hold nobody else up."""

import grpc

from shared.codec import digest_bytes
from shared.pb import federation_pb2 as pb
from tests.integration.peer import (
    OpenRound,
    Peer,
    changed,
    expect_status,
    open_round,
    payload_of,
)
from tests.processes import Scene

HALF = 1000
"""Bytes; the tiny model has some 2,000."""

NUM_UPLOADS = 16
"""How many places the server has for uploads."""


def test_all_streams_of_one_order_hold_one_place(opened: OpenRound) -> None:
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
    good, *others = (payload_of(changed(opened.base, 0.01 * one)) for one in range(4))
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
    assert [one.name for one in files] == [f"{order.order_id}.{digest_bytes(good)}"]


def test_a_stream_ends_with_its_order(session_scene: Scene, opened: OpenRound) -> None:
    """The next bytes that come of it are taken no more, and the answer is the order's."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    upload = peer.stream(order, payload)
    upload.send(payload[:HALF])
    upload.wait_until_committed(HALF)
    assert peer.report(order, gave_up=True) == pb.DIRECTIVE_ABANDON
    upload.send(payload[HALF:-1])
    assert upload.result().receipt == pb.RECEIPT_LATE
    (left,) = (session_scene.folder / "server/spool").glob(f"{order.order_id}.*")
    assert left.stat().st_size == HALF


def test_who_gets_a_place_after_its_order_has_ended_gives_it_back_at_once(scene: Scene) -> None:
    """Though nothing comes from it: others have waited behind it."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1, "--min-clients", 3),
        *("--min-updates", 1, "--max-uploads", 1, "--stall-after", 3600, "--lease", 3600),
    )
    opened = open_round({one: Peer(server.address, one) for one in (0, 1, 2)})
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
