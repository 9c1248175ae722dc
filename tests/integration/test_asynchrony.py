"""FedBuff: a round is a full buffer, whoever filled it; a slow client's update counts later."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from fedrounds.tensors.codec import decode_state
from fedrounds.tensors.entries import entry_kinds
from fedrounds.types import EntryKind
from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.peer import Peer, State, changed, entry_of, payload_of
from tests.processes import Scene, Server, fixed_port, wait_until
from tests.tiny_task import tiny

KINDS = entry_kinds(tiny.build_model())


def start(scene: Scene, *flags: str | float) -> Server:
    """Start a server on which no clock runs out."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--strategy", "fedbuff", "--farewell", 0),
        *("--stall-after", 3600, "--lease", 3600, "--norm-band", 0, *flags),
    )
    server.wait_for_line("fedserver listening on")
    return server


def deliver(peer: Peer, *, by: float = 0.01, num_examples: int = 10) -> pb.WorkOrder:
    """Answer the order that a client has, at once."""
    order = peer.pull_order()
    payload = payload_of(changed(peer.base_of(order), by))
    answer = peer.upload(order, payload, num_examples=num_examples)
    assert answer.receipt == pb.RECEIPT_STORED, answer
    return order


def model(scene: Scene, digest: str) -> State:
    """Read a global model of the server's folder."""
    return decode_state((scene.folder / f"server/models/{digest}.safetensors").read_bytes())


def test_a_slow_clients_update_counts_later_and_once_through_a_kill(scene: Scene) -> None:
    """Two rounds of two updates close without it; the server dies; it arrives in the third.

    The third model is the paper's formula, written out here; verify makes all of them again.
    """
    flags = (
        *("--rounds", 4, "--min-clients", 3, "--strategy-parameters", "buffer_size=2"),
        *("--keep-updates", "all", "--port", fixed_port()),
    )
    server = start(scene, *flags)
    peers = [Peer(server.address, client_id) for client_id in range(3)]
    slow = peers[2].pull_order()
    payload = payload_of(changed(peers[2].base_of(slow), 0.3))
    for _ in range(2):
        for peer in peers[:2]:
            deliver(peer)
    # Whoever has answered has an order again, although the slow client hasn't.
    assert peers[0].pull_order().round >= 2
    wait_until(lambda: len(scene.history()) == 3, what="round 3 to open")
    server.kill()

    server = start(scene, *flags)
    again = [Peer(server.address, client_id) for client_id in range(3)]
    # What is lost without its receipt is asked for again: the same order.
    assert again[2].pull_order().order_id == slow.order_id
    assert again[2].upload(slow, payload, num_examples=30).receipt == pb.RECEIPT_STORED
    assert again[2].upload(slow, payload, num_examples=30).receipt == pb.RECEIPT_DUPLICATE
    fresh = deliver(again[2], by=-0.1)
    assert fresh.round == 3
    for _ in range(2):
        deliver(again[0])
    assert server.wait() == 0
    for peer in (*peers, *again):
        peer.close()

    history = scene.history()
    assert [len(entry["updates"]) for entry in history] == [2, 2, 2, 2]
    updates = {update["order_id"]: update for update in history[2]["updates"]}
    assert {key: update["staleness"] for key, update in updates.items()} == {
        slow.order_id: 2,
        fresh.order_id: 0,
    }
    counted = [update["order_id"] for entry in history for update in entry["updates"]]
    assert sorted(counted) == sorted(set(counted))
    ended = {order["order_id"]: order["state"] for entry in history for order in entry["orders"]}
    assert {order_id for order_id, state in ended.items() if state == "COUNTED"} == set(counted)
    # At the end of the run nothing is left open.
    assert set(ended.values()) == {"COUNTED", "LATE"}
    assert history[2]["carried_over"] >= 1

    first, base, made = (
        model(scene, digest)
        for digest in (
            *(history[0]["base_digest"], history[2]["base_digest"], history[2]["model_digest"]),
        )
    )
    expect_formula(first, base, made)
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert verified.returncode == 0, verified.stdout
    assert verified.stdout.endswith("4 of 4 re-aggregated\n")
    shown = scene.command("show", "--round", "3", "--state-dir", scene.folder / "server").stdout
    assert "stale" in shown


def expect_formula(first: State, base: State, made: Mapping[str, torch.Tensor]) -> None:
    """Hold a model against algorithm 1 for 30 examples two rounds old and 10 fresh examples."""
    weight = 1 / 3**0.5
    old, new = changed(first, 0.3), changed(base, -0.1)
    for name, kind in KINDS.items():
        b, was, x, y = (state[name].double() for state in (base, first, old, new))
        if kind is EntryKind.PARAMETER:
            expected = b + (weight * (x - was) + (y - b)) / 2
        elif kind is EntryKind.MEAN:
            expected = (30 * (weight * x + (1 - weight) * b) + 10 * y) / 40
        else:
            expected = torch.maximum(b, torch.maximum(x, y))
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_what_is_too_stale_is_refused_and_on_record(scene: Scene) -> None:
    """Two at once are in two buffers of one; three rounds later an order is waited for no more."""
    server = start(
        *(scene, "--rounds", 1000, "--min-clients", 2, "--max-staleness", 1),
        *("--strategy-parameters", "buffer_size=1", "--concurrency", 2),
    )
    fast, slow = (Peer(server.address, client_id) for client_id in range(2))
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(deliver, (fast, slow)))
    assert {order.round for order in both} == {1}
    wait_until(lambda: len(scene.history()) == 3, what="round 3 to open")
    history = scene.history()
    assert [len(entry["updates"]) for entry in history] == [1, 1, 0]
    assert {entry["updates"][0]["client"] for entry in history[:2]} == {0, 1}

    order = slow.pull_order()
    payload = payload_of(changed(slow.base_of(order)))
    assert slow.report(order, batches=1) == pb.DIRECTIVE_CONTINUE
    upload = slow.stream(order, payload)
    upload.send(payload)
    upload.wait_until_committed(len(payload))
    while deliver(fast).round < order.round + 1:
        pass
    server.wait_for_line(f"round-opened.*round={order.round + 2}")
    wait_until(
        lambda: slow.report(order, batches=2) == pb.DIRECTIVE_ABANDON, what="the order's end"
    )
    assert slow.pull_order().round == order.round + 2
    assert upload.finish().receipt == pb.RECEIPT_LATE

    history = scene.history()
    states = {listed["order_id"]: listed["state"] for listed in entry_of(history, order)["orders"]}
    assert states[order.order_id] == "LATE"
    incidents = [incident for entry in history for incident in entry["incidents"]]
    assert [(incident["kind"], incident["client"]) for incident in incidents] == [
        ("update-late", 1),
        ("order-stale", 1),
    ]
    listed = scene.command("quarantine", "list", "--state-dir", scene.folder / "server").stdout
    assert "stale" in listed
    for peer in (fast, slow):
        peer.close()


def test_the_norm_cap_is_on_what_a_client_changed_of_its_own_base(scene: Scene) -> None:
    """However far the newest model is from that by now."""
    server = start(
        *(scene, "--rounds", 1000, "--min-clients", 2, "--max-delta-norm", 1.0),
        *("--strategy-parameters", "buffer_size=1"),
    )
    fast, slow = (Peer(server.address, client_id) for client_id in range(2))
    order = slow.pull_order()
    base = slow.base_of(order)
    while deliver(fast, by=0.05).round < order.round + 4:
        pass
    far = fast.pull_order()
    answer = slow.upload(order, payload_of(changed(base, 0.01)))
    assert answer.receipt == pb.RECEIPT_STORED, answer.reason
    # As near to an old model as can be, and beyond the cap from its own.
    answer = fast.upload(far, payload_of(changed(base, 0.01)))
    assert answer.receipt == pb.RECEIPT_REFUSED
    for peer in (fast, slow):
        peer.close()


def test_the_next_order_names_the_order_just_stored(scene: Scene) -> None:
    """Its client's state is in force as soon as the update is stored, not when it is counted."""
    server = start(
        *(scene, "--rounds", 1000, "--min-clients", 2), *("--strategy-parameters", "buffer_size=3")
    )
    answering, other = (Peer(server.address, answering) for answering in range(2))
    first = deliver(answering)
    other.pull_order()
    again = answering.pull_order()
    assert (again.round, again.last_counted_order_id) == (first.round, first.order_id)
    for peer in (answering, other):
        peer.close()


def test_no_more_work_than_concurrency_says_and_everybody_has_a_turn(scene: Scene) -> None:
    """One at a time, and first whoever isn't in the buffer yet."""
    server = start(
        *(scene, "--rounds", 1000, "--min-clients", 3, "--concurrency", 1),
        *("--strategy-parameters", "buffer_size=3"),
    )
    peers = {n: Peer(server.address, n) for n in range(3)}

    def asked() -> list[int]:
        states = {n: peer.pull(wait_s=0).state for n, peer in peers.items()}
        return [n for n, state in states.items() if state == pb.WORK_STATE_ORDER]

    answered: list[int] = []
    for _ in range(6):
        wait_until(lambda: asked() != [], what="somebody to be asked")
        (only,) = asked()
        answered.append(only)
        deliver(peers[only])
    assert sorted(answered[:3]) == sorted(answered[3:]) == [0, 1, 2]
    for peer in peers.values():
        peer.close()


def test_who_sent_a_nan_sits_out_a_buffer(scene: Scene) -> None:
    """Then it is asked again."""
    server = start(
        *(scene, "--rounds", 1000, "--min-clients", 2), *("--strategy-parameters", "buffer_size=2")
    )
    peers = [Peer(server.address, client_id) for client_id in range(3)]
    bad = peers[2]
    order = bad.pull_order()
    spoilt = payload_of(changed(bad.base_of(order), float("nan")))
    assert bad.upload(order, spoilt).receipt == pb.RECEIPT_REFUSED
    for number in (1, 2):
        for peer in peers[:2]:
            deliver(peer)
        server.wait_for_line(f"round-opened round={number + 1} ")
    assert bad.pull_order().round == order.round + 2
    asked = [{order["client"] for order in entry["orders"]} for entry in scene.history()]
    assert asked[:2] == [{0, 1, 2}, {0, 1}]
    for peer in peers:
        peer.close()
