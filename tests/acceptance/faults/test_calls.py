"""Calls that come twice, at once, too late or in the wrong order, made by hand against a server.

What a network and a client that was killed may repeat: the run is the same as without.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import grpc

from fedrounds.wire.pb import federation_pb2 as pb
from tests.acceptance.faults.aftermath import (
    History,
    conclude,
    expect_same_models,
    now,
)
from tests.acceptance.federation import expect_clean_exits, incident_kinds, start_server
from tests.integration.peer import OpenRound, Peer, changed, expect_status, open_round, payload_of
from tests.processes import Scene, Server
from tests.tiers import FULL

CLIENTS = (0, 1, 2)
NUM_ROUNDS = 3
NUM_AT_ONCE = 8

IN_THE_WAY = (
    grpc.StatusCode.ABORTED,  # a newer stream fenced this stream
    grpc.StatusCode.OUT_OF_RANGE,  # another stream committed bytes since the query
    grpc.StatusCode.UNAVAILABLE,  # the round is changing
)

Deliver = Callable[[OpenRound], None]


def payload_for(opened: OpenRound, client_id: int) -> bytes:
    """Return a client's update of a round: each client has another update."""
    return payload_of(changed(opened.base, 0.01 * (1 + client_id)))


def deliver_plainly(opened: OpenRound) -> None:
    """Send every client's update once."""
    for client_id, peer in opened.peers.items():
        answer = peer.upload(opened.orders[client_id], payload_for(opened, client_id))
        assert answer.receipt == pb.RECEIPT_STORED


def run_by_hand(scene: Scene, deliver: Deliver, *, state: str = "server") -> History:
    """Let peers take part in a run to its end; returns its history."""
    server = start_server(
        scene,
        *("--rounds", NUM_ROUNDS, "--min-clients", len(CLIENTS), "--require-all", "--seed", 5),
        state=state,
    )
    peers = {client_id: Peer(server.address, client_id) for client_id in CLIENTS}
    for _ in range(NUM_ROUNDS):
        deliver(open_round(peers))
    say_farewell(server, peers)
    return scene.history(state=state)


def say_farewell(server: Server, peers: Mapping[int, Peer]) -> None:
    """Hear from the server that the run is over, so that it ends."""
    for peer in peers.values():
        while (work := peer.pull()).state != pb.WORK_STATE_FINISHED:
            continue
        assert work.outcome == pb.RUN_OUTCOME_FINISHED
    expect_clean_exits(server)
    for peer in peers.values():
        peer.close()


def test_duplicate_and_reordered_calls_change_nothing(scene: Scene) -> None:
    """Each update several times at once and again later; old rounds' calls in the next one."""
    expected = run_by_hand(scene, deliver_plainly, state="undisturbed")
    earlier: list[OpenRound] = []
    receipts: list[int] = []

    def deliver(opened: OpenRound) -> None:
        for before in earlier:
            repeat_what_is_over(before)
        for client_id, peer in opened.peers.items():
            order, payload = opened.orders[client_id], payload_for(opened, client_id)
            # The last client's update closes the round: what comes after that is among `earlier`.
            own_receipts = upload_at_once(peer, order, payload)
            assert set(own_receipts) <= {pb.RECEIPT_STORED, pb.RECEIPT_DUPLICATE, None}
            assert own_receipts.count(pb.RECEIPT_STORED) <= 1
            receipts.extend(receipt for receipt in own_receipts if receipt is not None)
            while (again := try_upload(peer, order, payload)) is None:
                continue
            receipts.extend([again, peer.upload(order, payload).receipt])
            assert receipts[-1] == pb.RECEIPT_DUPLICATE
        earlier.append(opened)

    struck_at = now()
    history = run_by_hand(scene, deliver)
    expect_same_models(history, expected)
    assert receipts.count(pb.RECEIPT_STORED) == NUM_ROUNDS * len(CLIENTS)
    num_duplicates = receipts.count(pb.RECEIPT_DUPLICATE)
    assert num_duplicates >= NUM_ROUNDS * len(CLIENTS)
    conclude(
        scene,
        fault=f"every update sent {NUM_AT_ONCE} times at once, and again in later rounds",
        struck_at=struck_at,
        seen=[f"{num_duplicates} answered as duplicates"],
    )


def upload_at_once(peer: Peer, order: pb.WorkOrder, payload: bytes) -> list[int | None]:
    """Try several uploads of one update at the same time; returns what came of each."""
    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        sent = [threads.submit(try_upload, peer, order, payload) for _ in range(NUM_AT_ONCE)]
    return [upload.result() for upload in sent]


def try_upload(peer: Peer, order: pb.WorkOrder, payload: bytes) -> int | None:
    """Upload as a client does, from what is committed on; None if another stream was in the way."""
    try:
        answer = peer.query(order, payload)
        offset = len(payload) if answer.complete else answer.committed_bytes
        return peer.upload(order, payload, offset=offset).receipt
    except grpc.RpcError as error:
        if cast(grpc.Call, error).code() not in IN_THE_WAY:
            raise
        return None


def repeat_what_is_over(before: OpenRound) -> None:
    """Make the calls of a former round again: each gets its former answer, and nothing happens."""
    for client_id, peer in before.peers.items():
        order, payload = before.orders[client_id], payload_for(before, client_id)
        assert peer.query(order, payload).complete
        assert peer.upload(order, payload).receipt == pb.RECEIPT_DUPLICATE
        other = payload_of(changed(before.base, 0.5))
        assert peer.upload(order, other).receipt == pb.RECEIPT_REFUSED
        assert peer.report(order, batches=10**6) == pb.DIRECTIVE_ABANDON
        assert peer.report(order, gave_up=True) == pb.DIRECTIVE_ABANDON
        assert peer.download(order.sections[0].digest) == payload_of(before.base)


@FULL
def test_calls_in_an_order_that_no_client_has(scene: Scene) -> None:
    """Uploading before pulling, for another's order, pulling twice: nothing is mixed."""
    expected = run_by_hand(scene, deliver_plainly, state="undisturbed")

    def deliver(opened: OpenRound) -> None:
        first, second = opened.peers[0], opened.peers[1]
        payload = payload_for(opened, 1)
        for call in (
            lambda: first.upload(opened.orders[1], payload),
            lambda: first.query(opened.orders[1], payload),
            lambda: first.report(opened.orders[1], gave_up=True),
        ):
            expect_status(grpc.StatusCode.NOT_FOUND, call, match="isn't one of this session's")
        assert first.pull_order() == opened.orders[0]
        # Registered anew by the same instance: the same session, the same order.
        assert second.register(num_examples=[10]).session_id == second.session_id
        assert second.pull_order() == opened.orders[1]
        stream = second.stream(opened.orders[1], payload)
        stream.send(payload[:1000])
        stream.wait_until_committed(1000)
        # Its other half comes on a second stream, and after that on the first stream.
        assert second.upload(opened.orders[1], payload, offset=1000).receipt == pb.RECEIPT_STORED
        stream.send(payload[1000:])
        expect_status(grpc.StatusCode.ABORTED, stream.finish, match="a newer upload")
        for client_id in (0, 2):
            answer = opened.peers[client_id].upload(
                opened.orders[client_id], payload_for(opened, client_id)
            )
            assert answer.receipt == pb.RECEIPT_STORED

    struck_at = now()
    history = run_by_hand(scene, deliver)
    expect_same_models(history, expected)
    conclude(scene, fault="calls in an order that no client has", struck_at=struck_at)


@FULL
def test_a_bad_update_sent_many_times_at_once_is_kept_out_once(scene: Scene) -> None:
    """Refused once, kept once: whichever of the streams it was that brought the bytes."""
    server = start_server(
        scene,
        *("--rounds", NUM_ROUNDS, "--min-clients", len(CLIENTS), "--min-updates", 1, "--seed", 5),
    )
    peers = {client_id: Peer(server.address, client_id) for client_id in CLIENTS}
    struck_at = now()
    opened = open_round(peers)
    bad = payload_of(changed(opened.base, float("nan")))
    receipts = upload_at_once(peers[0], opened.orders[0], bad)
    assert set(receipts) <= {pb.RECEIPT_REFUSED, None}
    while try_upload(peers[0], opened.orders[0], bad) is None:
        continue
    for client_id in CLIENTS[1:]:
        peers[client_id].upload(opened.orders[client_id], payload_for(opened, client_id))
    for _ in range(NUM_ROUNDS - 1):
        # All three are needed: the first is called back at once.
        deliver_plainly(open_round(peers))
    say_farewell(server, peers)
    history = scene.history()
    assert incident_kinds(history) == ["update-refused"]
    (kept,) = (scene.folder / "server" / "quarantine").iterdir()
    assert kept.read_bytes() == bad
    conclude(
        scene,
        fault=f"a bad update sent {NUM_AT_ONCE} times at once",
        struck_at=struck_at,
    )
