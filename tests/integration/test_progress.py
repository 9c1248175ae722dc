"""ReportProgress and the clocks: who gets further, who doesn't, and what went wrong."""

import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import grpc
import pytest

from fedrounds.tensors.codec import digest_bytes
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.conftest import History
from tests.integration.peer import (
    OpenRound,
    Peer,
    SlowUpload,
    changed,
    entry_of,
    expect_status,
    open_round,
    payload_of,
)
from tests.processes import Scene, Server, wait_until

STALL_S = 2.0
LEASE_S = 6.0


@pytest.fixture(scope="module")
def impatient(module_scene: Scene) -> Server:
    """Give a server that gives orders up after 2 s and takes in one upload at a time."""
    started = module_scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1000, "--max-attempts", 1000),
        *("--min-clients", 3, "--min-updates", 1, "--max-uploads", 1),
        *("--stall-after", STALL_S, "--lease", LEASE_S),
    )
    started.wait_for_line("fedserver listening on")
    return started


@pytest.fixture
def hurried(impatient: Server) -> Iterator[OpenRound]:
    """Give a round of the impatient server with three clients, their orders just pulled."""
    peers = {client_id: Peer(impatient.address, client_id) for client_id in (0, 1, 2)}
    current = open_round(peers)
    yield current
    current.settle()
    for peer in peers.values():
        peer.close()


def test_an_order_whose_counters_stand_still_is_given_up_despite_heartbeats(
    hurried: OpenRound, module_scene: Scene
) -> None:
    """Reports alone don't keep an order: its counters must advance, as another client's do."""
    hurried.settle(2)
    stuck, busy = hurried.peers[0], hurried.peers[1]
    batches = iter(range(1, 1_000_000))
    # Two quick steps: from then on it is known how long one takes.
    stuck.report(hurried.orders[0], batches=6)
    directives: set[int] = set()

    def is_given_up() -> bool:
        directives.add(busy.report(hurried.orders[1], batches=next(batches)))
        return stuck.report(hurried.orders[0], batches=7) == pb.DIRECTIVE_ABANDON

    wait_until(is_given_up, what="the stuck client to get ABANDON", every_s=0.05)
    assert directives == {pb.DIRECTIVE_CONTINUE}
    payload = payload_of(changed(hurried.base))
    assert stuck.upload(hurried.orders[0], payload).receipt == pb.RECEIPT_LATE
    assert busy.upload(hurried.orders[1], payload).receipt == pb.RECEIPT_STORED
    open_round(hurried.peers).settle()
    entry = entry_of(module_scene.history(), hurried.orders[0])
    assert entry["phase"] == "DONE"
    states = {order["client"]: order["state"] for order in entry["orders"]}
    assert states == {0: "ABANDONED", 1: "COUNTED", 2: "COUNTED"}
    stalled = [incident for incident in entry["incidents"] if incident["kind"] == "client-stalled"]
    assert [incident["client"] for incident in stalled] == [0]
    assert stalled[0]["idle_s"] > STALL_S
    assert stalled[0]["why"] == "no-progress"


def test_a_batch_longer_than_the_silence_allowed_isnt_late(
    hurried: OpenRound, impatient: Server, module_scene: Scene
) -> None:
    """A client that reports with unchanged counters is waited for, a silent client isn't."""
    hurried.settle(2)
    silent, training = hurried.peers[0], hurried.peers[1]
    num_before = impatient.count_lines("client-stalled")
    # Its silence begins here: after the other client's last progress, which was its pull.
    silent.query(hurried.orders[0], b"")

    def is_given_up() -> bool:
        assert training.report(hurried.orders[1]) == pb.DIRECTIVE_CONTINUE
        return impatient.count_lines("client-stalled") > num_before

    wait_until(is_given_up, what="the silent client to be given up", every_s=0.05)
    payload = payload_of(changed(hurried.base))
    assert training.upload(hurried.orders[1], payload).receipt == pb.RECEIPT_STORED
    open_round(hurried.peers).settle()
    incidents = entry_of(module_scene.history(), hurried.orders[0])["incidents"]
    assert [(incident["client"], incident["kind"], incident["why"]) for incident in incidents] == [
        (0, "client-stalled", "silent")
    ]


def test_neither_tiny_progress_nor_registering_again_holds_a_round_open(scene: Scene) -> None:
    """Both end at a bound, which a client with a hundred times the data is far from."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1000, "--epochs", 2),
        *("--min-clients", 3, "--min-updates", 1, "--stall-after", 3600, "--lease", 3600),
        *("--first-step", 4, "--min-examples-per-s", 10, "--min-bytes-per-s", 1_000_000),
    )
    tiny, large = Peer(server.address, 0), Peer(server.address, 1, num_examples=1000)
    idler = Peer(server.address, 2)
    orders = {peer.client_id: peer.pull_order() for peer in (tiny, large)}
    batches = count(1)
    has_ended = False

    def are_given_up() -> bool:
        nonlocal has_ended
        number = next(batches)
        if not has_ended:
            # A further report after ABANDON would only get ABANDON again.
            has_ended = tiny.report(orders[0], batches=number) == pb.DIRECTIVE_ABANDON
        assert large.report(orders[1], batches=number) == pb.DIRECTIVE_CONTINUE
        idler.register(num_examples=[10])
        return has_ended and server.count_lines("client-lost") == 1

    wait_until(are_given_up, what="both to be given up", every_s=0.05)
    payload = payload_of(large.base_of(orders[1]))
    assert large.upload(orders[1], payload).receipt == pb.RECEIPT_STORED
    server.wait_for_line("round-done round=1")
    incidents = entry_of(scene.history(), orders[0])["incidents"]
    reasons = {incident["client"]: (incident["kind"], incident["why"]) for incident in incidents}
    assert reasons == {0: ("client-stalled", "too-long"), 2: ("client-lost", "never-pulled")}
    for peer in (tiny, large, idler):
        peer.close()


def test_an_order_nobody_pulled_yet_has_no_stall_clock(
    hurried: OpenRound, impatient: Server
) -> None:
    """A client that is connected and busy with nothing of this round isn't late so soon."""
    hurried.settle()
    slow = hurried.peers[2]
    orders = {client_id: hurried.peers[client_id].pull_order() for client_id in (0, 1)}
    num_before = impatient.count_lines("client-stalled")

    def is_given_up() -> bool:
        hurried.peers[1].report(orders[1], batches=1)
        # A call of any kind shows that the client lives.
        slow.query(hurried.orders[2], b"")
        return impatient.count_lines("client-stalled") > num_before

    wait_until(is_given_up, what="the client that pulled and did nothing to be given up")
    order = slow.pull_order()
    assert order.round == orders[0].round
    assert slow.report(order) == pb.DIRECTIVE_CONTINUE
    for peer, pulled in ((slow, order), (hurried.peers[1], orders[1])):
        assert peer.upload(pulled, payload_of(hurried.base)).receipt == pb.RECEIPT_STORED


class Holding:
    """Client 0's upload, which holds the only slot: its file is a pipe, which doesn't open."""

    def __init__(self, opened: OpenRound, folder: Path) -> None:
        self._peer, self._order = peer, order = opened.peers[0], opened.orders[0]
        self._batches = count(1)
        ordinary, piped = (payload_of(changed(opened.base, by)) for by in (0.01, 0.02))
        before = peer.stream(order, ordinary)
        before.send(ordinary[:1])
        before.wait_until_committed(1)
        self._pipe = folder / f"server/spool/{order.order_id}.{digest_bytes(piped)}"
        os.mkfifo(self._pipe)
        self._stream = peer.stream(order, piped)
        # The older stream had the slot, and the newer stream, which ended it, was the next in line.
        expect_status(grpc.StatusCode.ABORTED, before.result, match="a newer upload")

    def stay(self) -> None:
        """Keep the order from being given up."""
        self._peer.report(self._order, batches=next(self._batches))

    def let_go(self) -> None:
        """Break the stream off, and let the file open so that the server can close it."""
        self._stream.cancel()
        reader = os.open(self._pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._pipe.unlink()
        os.close(reader)


@pytest.fixture
def holding(hurried: OpenRound, module_scene: Scene) -> Iterator[Holding]:
    """Give the upload that holds the only slot; it has freed it afterwards."""
    held = Holding(hurried, module_scene.folder)
    yield held
    held.let_go()


@pytest.fixture
def queued(hurried: OpenRound, holding: Holding, impatient: Server) -> SlowUpload:
    """Give client 1's upload, which has waited so long that client 2, silent, is given up."""
    payload = payload_of(changed(hurried.base))
    waiting = hurried.peers[1].stream_in_line(hurried.orders[1], payload)
    waiting.send(payload)
    given_up = "client=2 why=silent"
    num_before = impatient.count_lines(given_up)
    # Its last call: its clock begins after that of the client that waits.
    hurried.peers[2].report(hurried.orders[2], batches=1)

    def is_given_up() -> bool:
        holding.stay()
        return impatient.count_lines(given_up) > num_before

    wait_until(is_given_up, what="the silent client to be given up", every_s=0.05)
    return waiting


def test_a_client_that_waits_for_the_server_to_take_its_upload_is_not_late(
    hurried: OpenRound, queued: SlowUpload
) -> None:
    """With every slot taken, a stream that queues isn't blamed for what the server can't do."""
    assert not queued.is_done
    assert hurried.peers[1].report(hurried.orders[1]) == pb.DIRECTIVE_CONTINUE


def test_an_upload_that_waits_for_its_slot_ends_with_its_order(
    hurried: OpenRound, queued: SlowUpload
) -> None:
    """The slot isn't free yet, but there is nothing left to wait for."""
    assert hurried.peers[1].report(hurried.orders[1], gave_up=True) == pb.DIRECTIVE_ABANDON
    assert queued.result().receipt == pb.RECEIPT_LATE


def test_an_upload_that_trickles_gives_its_slot_to_others(hurried: OpenRound) -> None:
    """A byte now and then isn't enough any more, and the upload goes on later where it was."""
    hurried.settle(2)
    payload = payload_of(changed(hurried.base))
    peer, order = hurried.peers[0], hurried.orders[0]
    trickling = peer.stream(order, payload)
    trickling.send(payload[:1])
    trickling.wait_until_committed(1)
    queued = hurried.peers[1].stream(hurried.orders[1], payload)
    queued.send(payload)
    num_sent = count(1)

    def has_ended() -> bool:
        begin = next(num_sent)
        trickling.send(payload[begin : begin + 1])
        return trickling.is_done

    wait_until(has_ended, what="the trickling stream to end", every_s=0.05)
    expect_status(grpc.StatusCode.UNAVAILABLE, trickling.result, match="too little came")
    assert queued.finish().receipt == pb.RECEIPT_STORED
    committed = peer.query(order, payload).committed_bytes
    assert committed > 1
    assert peer.upload(order, payload, offset=committed).receipt == pb.RECEIPT_STORED


def test_a_round_closes_at_its_deadline_with_what_it_has_or_fails(scene: Scene) -> None:
    """Whoever is still at work then is late, though no clock of progress has run out."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1000, "--max-attempts", 1000),
        *("--min-clients", 2, "--min-updates", 1, "--round-deadline", 3),
        *("--stall-after", 3600, "--lease", 3600),
    )
    peers = {client_id: Peer(server.address, client_id) for client_id in (0, 1)}
    opened = open_round(peers)
    assert opened.settle(0) == [pb.RECEIPT_STORED]
    batches = iter(range(1, 1_000_000))

    def is_over() -> bool:
        return peers[1].report(opened.orders[1], batches=next(batches)) == pb.DIRECTIVE_ABANDON

    wait_until(is_over, what="the client that is still at work to get ABANDON", every_s=0.05)
    assert opened.settle(1) == [pb.RECEIPT_LATE]
    # Nobody delivers to the round after it.
    server.wait_for_line("round-opened round=2 attempt=2")
    closed, failed, _ = scene.history()
    states = {order["client"]: order["state"] for order in closed["orders"]}
    assert (closed["phase"], states) == ("DONE", {0: "COUNTED", 1: "LATE"})
    assert [incident["kind"] for incident in closed["incidents"]] == ["update-late"]
    (incident,) = failed["incidents"]
    assert incident["kind"] == "round-failed"
    assert incident["reason"] == "only 0 of 1 updates were there at its deadline"
    for peer in peers.values():
        peer.close()


def test_an_upload_nothing_comes_from_gives_its_slot_to_others(
    hurried: OpenRound, impatient: Server
) -> None:
    """A stream that stands still ends with UNAVAILABLE, keeps its bytes and can be resumed."""
    payload = payload_of(changed(hurried.base))
    peer, order = hurried.peers[0], hurried.orders[0]
    idle = peer.stream(order, payload)
    idle.send(payload[:100])
    idle.wait_until_committed(100)
    queued = hurried.peers[1].stream(hurried.orders[1], payload)
    queued.send(payload)
    batches = iter(range(1, 1_000_000))

    def has_ended() -> bool:
        # The client itself gets further; it is only this stream that doesn't.
        peer.report(order, batches=next(batches))
        return idle.is_done

    wait_until(has_ended, what="the idle stream to end", every_s=0.05)
    expect_status(grpc.StatusCode.UNAVAILABLE, idle.result, match="100 bytes")
    assert queued.finish().receipt == pb.RECEIPT_STORED
    assert peer.upload(order, payload, offset=100).receipt == pb.RECEIPT_STORED
    assert impatient.count_lines("server-failed") == 0


def test_a_client_that_vanishes_before_it_pulls_is_lost_and_its_id_is_free(
    hurried: OpenRound, impatient: Server, module_scene: Scene
) -> None:
    """When a lease ends the round goes on without the client, and another may use the id."""
    ghost = Peer(impatient.address, 3)
    hurried.settle()
    haunted = open_round(hurried.peers)
    haunted.settle()
    # The round can't close before the ghost's lease is over.
    following = open_round(hurried.peers)
    assert following.orders[0].round == haunted.orders[0].round + 1
    entry = entry_of(module_scene.history(), haunted.orders[0])
    states = {order["client"]: order["state"] for order in entry["orders"]}
    assert states == {0: "COUNTED", 1: "COUNTED", 2: "COUNTED", 3: "ABANDONED"}
    lost = [
        incident["client"] for incident in entry["incidents"] if incident["kind"] == "client-lost"
    ]
    assert lost == [3]
    assert ghost.register(instance_key="another").session_id != ghost.session_id
    ghost.close()
    following.settle()


def test_an_incident_reported_twice_is_kept_once(opened: OpenRound, history: History) -> None:
    """A repeated report differs from a new incident by its number; NaN stays a word."""
    peer, order = opened.peers[0], opened.orders[0]
    seen = pb.Incident(
        sequence=1,
        kind=pb.INCIDENT_KIND_NON_FINITE_GRADIENT,
        step=3,
        epoch=1,
        tensor="0.weight",
        detail={"lr": 0.05, "grad_norm_0": float("nan")},
    )
    other = pb.Incident(sequence=2, kind=pb.INCIDENT_KIND_CLIENT_STATE_LOST)
    for incidents in ([seen], [seen], [seen, other]):
        assert peer.report(order, incidents=incidents) == pb.DIRECTIVE_CONTINUE
    kept = entry_of(history(), order)["incidents"]
    json.dumps(kept, allow_nan=False)
    assert [(incident["kind"], incident["client"]) for incident in kept] == [
        ("non-finite-gradient", 0),
        ("client-state-lost", 0),
    ]
    first = kept[0]
    assert (first["step"], first["epoch"], first["tensor"]) == (3, 1, "0.weight")
    assert (first["lr"], first["grad_norm_0"]) == (0.05, "nan")
    assert opened.settle(0) == [pb.RECEIPT_STORED]


def test_of_an_incident_only_declared_names_are_kept(opened: OpenRound, history: History) -> None:
    """Who and when are what the server saw, and no name can carry a client's data out."""
    order = opened.orders[0]
    forged = pb.Incident(
        sequence=1,
        kind=pb.INCIDENT_KIND_NON_FINITE_LOSS,
        step=3,
        tensor="patient 17",
        detail={"kind": 1.0, "client": 2.0, "at": 0.0, "step": 9.0, "lr": 0.1, "patient 17": 1.0},
    )
    opened.peers[0].report(order, incidents=[forged])
    (kept,) = entry_of(history(), order)["incidents"]
    assert (kept["kind"], kept["client"], kept["step"]) == ("non-finite-loss", 0, 3)
    assert kept["at"].startswith("20")
    assert kept["lr"] == 0.1
    assert "patient 17" not in json.dumps(kept)


def test_an_incident_of_no_kind_is_refused(opened: OpenRound) -> None:
    """Zero is no kind, and neither is a number this server has no name for."""
    for kind in (pb.INCIDENT_KIND_UNSPECIFIED, 99):
        report = pb.ReportProgressRequest(
            session_id=opened.peers[0].session_id, order_id=opened.orders[0].order_id
        )
        report.incidents.add(sequence=1, kind=kind)
        expect_status(
            grpc.StatusCode.INVALID_ARGUMENT,
            partial(opened.peers[0].stub.ReportProgress, report),
            match="no incident kind",
        )


def test_an_order_a_client_gives_up_ends_and_the_round_goes_on(
    opened: OpenRound, history: History
) -> None:
    """Nobody waits for a client that says it can't deliver; saying it twice is fine."""
    peer, order = opened.peers[0], opened.orders[0]
    incident = pb.Incident(sequence=1, kind=pb.INCIDENT_KIND_TRAINING_FAILED)
    for _ in range(2):
        assert peer.report(order, incidents=[incident], gave_up=True) == pb.DIRECTIVE_ABANDON
    assert opened.settle(1, 2) == [pb.RECEIPT_STORED] * 2
    following = open_round(opened.peers)
    assert following.orders[0].last_counted_order_id != order.order_id
    assert following.orders[1].last_counted_order_id == opened.orders[1].order_id
    following.settle()
    entry = entry_of(history(), order)
    states = {order["client"]: order["state"] for order in entry["orders"]}
    assert states == {0: "ABANDONED", 1: "COUNTED", 2: "COUNTED"}
    assert [incident["kind"] for incident in entry["incidents"]] == ["training-failed"]


def test_giving_up_after_the_receipt_changes_nothing(opened: OpenRound, history: History) -> None:
    """What is acknowledged counts, whatever its client says afterwards."""
    assert opened.settle(0) == [pb.RECEIPT_STORED]
    opened.peers[0].report(opened.orders[0], gave_up=True)
    opened.settle(1, 2)
    open_round(opened.peers).settle()
    entry = entry_of(history(), opened.orders[0])
    assert {order["state"] for order in entry["orders"]} == {"COUNTED"}
