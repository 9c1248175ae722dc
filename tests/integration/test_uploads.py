"""UploadUpdate and QueryUpload: broken and repeated streams, and updates that come too late."""

import os
from functools import partial
from itertools import chain, repeat
from typing import Any

import grpc
import pytest

from fedrounds.tensors.codec import digest_bytes
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.conftest import History
from tests.integration.peer import (
    OpenRound,
    Peer,
    changed,
    entry_of,
    expect_status,
    open_round,
    payload_of,
)
from tests.processes import Scene, wait_until

HALF = 1000
"""Bytes; the tiny model has some 2,000."""


def update_of(history: list[dict[str, Any]], opened: OpenRound, client_id: int) -> dict[str, Any]:
    """Return the one update that a round's history holds of a client."""
    entry = entry_of(history, opened.orders[client_id])
    (update,) = (update for update in entry["updates"] if update["client"] == client_id)
    assert isinstance(update, dict)
    return update


def test_a_good_update_is_stored_and_the_same_again_is_a_duplicate(
    opened: OpenRound, history: History
) -> None:
    """A receipt that got lost is asked for by sending again, and nothing counts twice."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    assert not peer.query(order, payload).complete
    assert peer.upload(order, payload).receipt == pb.RECEIPT_STORED
    assert peer.query(order, payload).complete
    assert peer.upload(order, payload).receipt == pb.RECEIPT_DUPLICATE
    opened.settle(1, 2)
    next_round = open_round(opened.peers)
    assert peer.upload(order, payload).receipt == pb.RECEIPT_DUPLICATE
    next_round.settle()
    kept = update_of(history(), opened, 0)
    assert (kept["digest"], kept["verdict"]) == (digest_bytes(payload), "COUNTED")
    assert kept["metrics"] == {"loss": 0.5, "accuracy": 0.75}


def test_other_bytes_for_a_delivered_order_are_refused_and_the_first_stand(
    opened: OpenRound, history: History
) -> None:
    """An order takes one update; what was acknowledged isn't replaced."""
    peer, order = opened.peers[0], opened.orders[0]
    first, second = payload_of(changed(opened.base)), payload_of(changed(opened.base, 0.02))
    assert peer.upload(order, first).receipt == pb.RECEIPT_STORED
    answer = peer.upload(order, second)
    assert answer.receipt == pb.RECEIPT_REFUSED
    assert "the first one stands" in answer.reason
    opened.settle(1, 2)
    open_round(opened.peers).settle()
    kept = update_of(history(), opened, 0)
    assert (kept["digest"], kept["verdict"]) == (digest_bytes(first), "COUNTED")


def test_a_broken_stream_goes_on_where_it_was_committed(opened: OpenRound) -> None:
    """After a cut, QueryUpload says how much is there, and only the rest is sent."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    upload = peer.stream(order, payload)
    upload.send(payload[:HALF])
    upload.wait_until_committed(HALF)
    upload.cancel()
    answer = peer.query(order, payload)
    assert (answer.committed_bytes, answer.complete) == (HALF, False)
    assert peer.upload(order, payload, offset=HALF).receipt == pb.RECEIPT_STORED


def test_a_stream_that_ends_too_early_keeps_what_it_brought(opened: OpenRound) -> None:
    """A proxy can end a stream early: the client may repeat the call, from where it was."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    expect_status(
        grpc.StatusCode.UNAVAILABLE,
        lambda: peer.upload(order, payload, sent=payload[:HALF]),
        match=f"ended at byte {HALF} of {len(payload)}",
    )
    assert peer.upload(order, payload, offset=HALF).receipt == pb.RECEIPT_STORED


def test_more_bytes_than_the_header_says_are_not_taken(opened: OpenRound) -> None:
    """The size in the header bounds what one stream can write."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: peer.upload(order, payload, sent=payload + b"more"),
        match="holds more than",
    )
    assert peer.query(order, payload).committed_bytes == 0
    assert peer.upload(order, payload).receipt == pb.RECEIPT_STORED


def test_a_message_over_the_limit_is_refused_and_nothing_is_lost(opened: OpenRound) -> None:
    """One message may have 4 MiB; an update goes in smaller chunks, and what came before stays."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    stream = peer.stream(order, payload)
    stream.send(payload[:HALF])
    stream.send(bytes(5 << 20))
    expect_status(grpc.StatusCode.RESOURCE_EXHAUSTED, stream.finish, match="larger than max")
    committed = peer.query(order, payload).committed_bytes
    assert committed in (0, HALF)
    assert peer.upload(order, payload, offset=committed).receipt == pb.RECEIPT_STORED
    opened.settle(1, 2)


@pytest.mark.parametrize("offset", [1, HALF + 1, 2**40])
def test_a_wrong_offset_is_out_of_range(opened: OpenRound, offset: int) -> None:
    """A stream that doesn't begin where the committed bytes end learns where they end."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    expect_status(
        grpc.StatusCode.OUT_OF_RANGE,
        lambda: peer.upload(order, payload, offset=offset),
        match="0 bytes are committed",
    )


def test_a_newer_stream_of_an_order_fences_the_older(opened: OpenRound) -> None:
    """A client that came back isn't held up by what is left of its former connection."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    older = peer.stream(order, payload)
    older.send(payload[:HALF])
    older.wait_until_committed(HALF)
    newer = peer.stream(order, payload, offset=HALF)
    newer.send(payload[HALF : HALF + 100])
    newer.wait_until_committed(HALF + 100)
    older.send(b"from the past")
    expect_status(grpc.StatusCode.ABORTED, older.result, match="a newer upload")
    newer.send(payload[HALF + 100 :])
    assert newer.finish().receipt == pb.RECEIPT_STORED


def test_bytes_that_changed_on_the_way_are_dropped_and_sent_again(opened: OpenRound) -> None:
    """One wrong bit is DATA_LOSS, nothing of the stream is kept, and a second try is good."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    flipped = payload[:HALF] + bytes([payload[HALF] ^ 1]) + payload[HALF + 1 :]
    expect_status(grpc.StatusCode.DATA_LOSS, lambda: peer.upload(order, payload, sent=flipped))
    assert peer.query(order, payload).committed_bytes == 0
    assert peer.upload(order, payload).receipt == pb.RECEIPT_STORED


def test_an_update_for_an_order_that_ended_is_late(opened: OpenRound, history: History) -> None:
    """What comes after the end changes nothing; it is on record, and asking again says so."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    assert peer.report(order, gave_up=True) == pb.DIRECTIVE_ABANDON
    assert peer.upload(order, payload).receipt == pb.RECEIPT_LATE
    assert peer.upload(order, payload).receipt == pb.RECEIPT_LATE
    opened.settle(1, 2)
    next_round = open_round(opened.peers)
    assert peer.upload(order, payload).receipt == pb.RECEIPT_LATE
    next_round.settle()
    entry = entry_of(history(), order)
    verdicts = {update["client"]: update["verdict"] for update in entry["updates"]}
    assert verdicts == {0: "ABANDONED", 1: "COUNTED", 2: "COUNTED"}
    late = [incident for incident in entry["incidents"] if incident["kind"] == "update-late"]
    assert [incident["client"] for incident in late] == [0]


def test_an_upload_without_a_header_is_refused(opened: OpenRound) -> None:
    """Data first, no message at all, or no encoding: the answer says what must come first."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(opened.base)
    for messages in (
        [],
        [pb.UploadUpdateRequest(data=payload)],
        [peer.header(order, payload, encoding=pb.ENCODING_UNSPECIFIED)],
    ):
        expect_status(
            grpc.StatusCode.INVALID_ARGUMENT,
            partial(peer.stub.UploadUpdate, iter(messages)),
            match="begins with a header",
        )


def test_a_second_header_in_an_upload_is_refused(opened: OpenRound) -> None:
    """A stream speaks of one update; a header in its middle ends it and what came stays."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(opened.base)
    upload = peer.stream(order, payload)
    upload.send(payload[:HALF])
    upload.send_message(peer.header(order, payload))
    expect_status(grpc.StatusCode.INVALID_ARGUMENT, upload.result, match="an upload has one header")
    assert peer.upload(order, payload, offset=HALF).receipt == pb.RECEIPT_STORED


@pytest.mark.parametrize("size_bytes", [2**63, 2**64 - 1])
def test_a_size_no_file_can_have_is_an_invalid_argument(opened: OpenRound, size_bytes: int) -> None:
    """The wire's numbers are larger than the database's; they get an answer all the same."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(opened.base)
    expect_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda: peer.upload(order, payload, size_bytes=size_bytes),
        match="size_bytes is",
    )
    assert peer.upload(order, payload).receipt == pb.RECEIPT_STORED


def test_what_was_left_unfinished_fills_no_disk(scene: Scene) -> None:
    """Of the updates that a client begins for one order the newest stays, and goes with the round.

    Those that are recorded stay: here all of them are to be kept.
    """
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 2, "--min-clients", 2, "--min-updates", 1),
        *("--keep-updates", "all", "--stall-after", 3600, "--lease", 3600, "--norm-band", 0),
    )
    server.wait_for_line("fedserver listening on")
    peers = {client_id: Peer(server.address, client_id) for client_id in (0, 1)}
    opened = open_round(peers)
    spool = scene.folder / "server/spool"
    digests = []
    for by in (0.01, 0.02, 0.03):
        payload = payload_of(changed(opened.base, by))
        digests.append(digest_bytes(payload))
        expect_status(
            grpc.StatusCode.UNAVAILABLE,
            partial(peers[0].upload, opened.orders[0], payload, sent=payload[:HALF]),
            match=f"ended at byte {HALF}",
        )
    assert {path.name: path.stat().st_size for path in spool.iterdir()} == {
        f"{opened.orders[0].order_id}.{digests[-1]}": HALF
    }
    assert peers[0].report(opened.orders[0], gave_up=True) == pb.DIRECTIVE_ABANDON
    assert opened.settle(1) == [pb.RECEIPT_STORED]
    open_round(peers).settle()
    wait_until(
        lambda: not list(spool.glob(f"{opened.orders[0].order_id}.*")),
        what="the unfinished update to go",
    )
    assert list(spool.glob(f"{opened.orders[1].order_id}.*"))
    for peer in peers.values():
        peer.close()


def test_a_stream_of_empty_chunks_gives_its_slot_to_others(scene: Scene) -> None:
    """Chunks without a byte are no progress, however many come."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1, "--min-clients", 1),
        *("--stall-after", 1, "--lease", 3600),
    )
    server.wait_for_line("fedserver listening on")
    peer = Peer(server.address, 0)
    order = peer.pull_order()
    payload = payload_of(peer.base_of(order))
    empty = repeat(pb.UploadUpdateRequest(data=b""))
    expect_status(
        grpc.StatusCode.UNAVAILABLE,
        lambda: peer.stub.UploadUpdate(chain([peer.header(order, payload)], empty), timeout=30),
        match="nothing came for 1 s; 0 bytes are there",
    )
    peer.close()


def test_a_disk_that_is_slow_to_open_a_file_holds_nobody_else_up(
    session_scene: Scene, opened: OpenRound
) -> None:
    """The file is a pipe here, which can't be opened before somebody reads from it."""
    peer, order = opened.peers[0], opened.orders[0]
    payload = payload_of(changed(opened.base))
    pipe = session_scene.folder / f"server/spool/{order.order_id}.{digest_bytes(payload)}"
    os.mkfifo(pipe)
    upload = peer.stream(order, payload)
    try:
        for _ in range(100):
            assert opened.peers[1].report(opened.orders[1], batches=1) == pb.DIRECTIVE_CONTINUE
        assert not upload.is_done
    finally:
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        upload.cancel()
    wait_until(lambda: upload.is_done, what="the upload to end")
    pipe.unlink()
    os.close(reader)
    assert peer.upload(order, payload).receipt == pb.RECEIPT_STORED
