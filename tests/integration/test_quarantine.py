"""What is kept out of the model is kept, with proof; its sender sits out; a person decides."""

import json
import subprocess
from collections.abc import Iterator

import pytest
import torch

from fedrounds.tensors.codec import digest_bytes
from fedrounds.wire.pb import federation_pb2 as pb
from fedserver.records import HeldState, HeldUpdate
from fedserver.store import Store
from tests.integration.peer import OpenRound, Peer, changed, entry_of, open_round, payload_of
from tests.processes import Scene, Server

CLIENTS = (0, 1, 2, 3, 4)
WEIGHT = "0.weight"
ROOM = 4000
"""Bytes of quarantine: two payloads of the tiny model fit, three don't."""


@pytest.fixture
def strict(scene: Scene) -> Server:
    """Give a server of a test's own that needs three of five clients."""
    started = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1000, "--min-clients", 3),
        *("--stall-after", 3600, "--lease", 3600, "--quarantine-bytes", ROOM),
    )
    started.wait_for_line("fedserver listening on")
    return started


@pytest.fixture
def peers(strict: Server) -> Iterator[dict[int, Peer]]:
    """Give five clients; the first round asks some of them, later rounds ask all."""
    connected = {client_id: Peer(strict.address, client_id) for client_id in CLIENTS}
    settle_first_round(connected)
    yield connected
    for peer in connected.values():
        peer.close()


def settle_first_round(peers: dict[int, Peer]) -> None:
    """Deliver for whoever was there when the first round opened, so that the next has all."""
    for peer in peers.values():
        work = peer.pull(wait_s=1)
        if work.state == pb.WORK_STATE_ORDER and work.order.round == 1:
            peer.upload(work.order, payload_of(peer.base_of(work.order)))


def held(scene: Scene) -> list[HeldUpdate]:
    """Return what is on record of the quarantine."""
    store = Store(scene.folder / "server" / "federation.sqlite", read_only=True)
    try:
        return store.quarantine.held_updates()
    finally:
        store.close()


def kept_payloads(scene: Scene) -> dict[str, bytes]:
    """Return the payloads in the quarantine's folder by digest."""
    folder = scene.folder / "server" / "quarantine"
    return {path.name.rpartition(".")[2]: path.read_bytes() for path in folder.iterdir()}


def quarantine(scene: Scene, action: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `fedserver quarantine ACTION`."""
    return scene.command("quarantine", action, "--state-dir", scene.folder / "server", *flags)


def spoilt(opened: OpenRound, seed: int = 0) -> bytes:
    """Return an update with three NaN in one tensor and one infinity in another."""
    state = changed(opened.base, by=0.01 + seed / 1000)
    state[WEIGHT].view(-1)[torch.tensor([7, 8, 30])] = torch.nan
    state["3.bias"][1] = -torch.inf
    return payload_of(state)


def cohort(peers: dict[int, Peer], *expected: int) -> OpenRound:
    """Return the open round, which must ask these clients and no others."""
    opened = open_round({client_id: peers[client_id] for client_id in expected})
    for client_id in peers.keys() - set(expected):
        assert peers[client_id].pull(wait_s=0).state == pb.WORK_STATE_WAIT, (
            f"client {client_id} is asked"
        )
    return opened


def test_a_refused_update_is_kept_with_proof_and_its_sender_sits_out(
    scene: Scene, peers: dict[int, Peer]
) -> None:
    """The bytes are there as they came, which tensors and where is on record, and it comes back."""
    opened = cohort(peers, *CLIENTS)
    first_round = opened.orders[0].round
    bad = spoilt(opened)
    assert peers[2].upload(opened.orders[2], bad).receipt == pb.RECEIPT_REFUSED
    (kept,) = held(scene)
    assert (kept.client_id, kept.state, kept.kept_bytes) == (2, HeldState.HELD, len(bad))
    assert kept.refusal.evidence == {
        "kind": "non-finite",
        "tensors": {
            WEIGHT: {"count": 3, "first_index": 7},
            "3.bias": {"count": 1, "first_index": 1},
        },
    }
    assert kept_payloads(scene) == {digest_bytes(bad): bad}
    opened.settle(0, 1, 3, 4)

    without = cohort(peers, 0, 1, 3, 4)
    assert without.orders[0].round == first_round + 1
    without.settle()
    again = cohort(peers, *CLIENTS)
    assert again.orders[2].round == first_round + 2
    incidents = entry_of(scene.history(), opened.orders[2])["incidents"]
    assert [incident["suspended_until"] for incident in incidents] == [first_round + 2]

    # A second time it costs twice as many rounds, and what counts clears the account.
    peers[2].upload(again.orders[2], spoilt(again, seed=1))
    again.settle(0, 1, 3, 4)
    for _ in range(2):
        cohort(peers, 0, 1, 3, 4).settle()
    cohort(peers, *CLIENTS).settle()
    last = cohort(peers, *CLIENTS)
    peers[2].upload(last.orders[2], spoilt(last, seed=2))
    last.settle(0, 1, 3, 4)
    cohort(peers, 0, 1, 3, 4).settle()
    cohort(peers, *CLIENTS)
    # Three payloads were too many for the room there is: the oldest went.
    assert [update.state for update in held(scene)] == ["EVICTED", "HELD", "HELD"]
    assert digest_bytes(bad) not in kept_payloads(scene)
    assert len(kept_payloads(scene)) == 2


def test_an_update_far_out_of_its_cohorts_norms_is_excluded_until_it_is_released(
    scene: Scene, peers: dict[int, Peer]
) -> None:
    """It doesn't count, the numbers are on record, and a person's release ends both."""
    opened = cohort(peers, *CLIENTS)
    usual, far = payload_of(changed(opened.base, by=0.01)), changed(opened.base, by=0.5)
    assert peers[1].upload(opened.orders[1], payload_of(far)).receipt == pb.RECEIPT_STORED
    for client_id in (0, 2, 3, 4):
        peers[client_id].upload(opened.orders[client_id], usual)
    without = cohort(peers, 0, 2, 3, 4)
    torch.testing.assert_close(without.base[WEIGHT], opened.base[WEIGHT] + 0.01)
    entry = entry_of(scene.history(), opened.orders[1])
    verdicts = {update["client"]: update["verdict"] for update in entry["updates"]}
    assert verdicts == {0: "COUNTED", 1: "EXCLUDED", 2: "COUNTED", 3: "COUNTED", 4: "COUNTED"}
    (incident,) = entry["incidents"]
    assert (incident["kind"], incident["client"]) == ("update-excluded", 1)
    assert incident["norm"] == pytest.approx(50 * incident["typical"], rel=0.01)

    (kept,) = held(scene)
    shown = quarantine(scene, "show", "--order", kept.order_id)
    assert shown.returncode == 0
    assert "norm-band" in shown.stdout
    assert json.dumps(kept.refusal.evidence) in shown.stdout
    assert list(kept_payloads(scene).values()) == [payload_of(far)]
    listed = quarantine(scene, "list").stdout
    assert "excluded" in listed
    assert "held" in listed

    assert quarantine(scene, "release", "--order", kept.order_id).returncode == 0
    assert kept_payloads(scene) == {}
    without.settle()
    again = cohort(peers, *CLIENTS)
    peers[1].upload(again.orders[1], payload_of(changed(again.base, by=0.5)))
    for client_id in (0, 2, 3, 4):
        peers[client_id].upload(again.orders[client_id], payload_of(changed(again.base, by=0.01)))
    after = cohort(peers, *CLIENTS)
    mean = (4 * 0.01 + 0.5) / 5
    torch.testing.assert_close(after.base[WEIGHT], again.base[WEIGHT] + mean)


def test_norms_are_judged_by_the_examples_registered_and_not_by_those_claimed(
    scene: Scene, strict: Server
) -> None:
    """The client with the most data counts in every round; who only claims to have it doesn't."""
    peers = {
        client_id: Peer(strict.address, client_id, num_examples=2000 if client_id == 4 else 10)
        for client_id in CLIENTS
    }
    settle_first_round(peers)

    def deliver(opened: OpenRound, *, with_much: int) -> None:
        for client_id, order in opened.orders.items():
            payload = payload_of(changed(opened.base, by=0.4 if client_id == with_much else 0.01))
            says = (2000, 126) if client_id == with_much else (10, 2)
            peers[client_id].upload(order, payload, num_examples=says[0], num_steps=says[1])

    for _ in range(3):
        deliver(cohort(peers, *CLIENTS), with_much=4)
    opened = cohort(peers, *CLIENTS)
    assert held(scene) == []
    deliver(opened, with_much=0)
    cohort(peers, 1, 2, 3, 4)
    (kept,) = held(scene)
    assert (kept.client_id, kept.refusal.evidence["kind"]) == (0, "norm-band")
    for peer in peers.values():
        peer.close()


def test_a_command_for_an_update_that_isnt_there_fails_with_a_sentence(
    scene: Scene, peers: dict[int, Peer]
) -> None:
    """No order, an unknown order, one dropped twice, no such action: a sentence each."""
    assert "nothing was refused" in quarantine(scene, "list").stdout
    opened = cohort(peers, *CLIENTS)
    peers[0].upload(opened.orders[0], spoilt(opened))
    (kept,) = held(scene)
    dropped = quarantine(scene, "drop", "--order", kept.order_id)
    assert (dropped.returncode, kept_payloads(scene)) == (0, {})
    for action, flags, words in (
        ("drop", ["--order", kept.order_id], "is dropped already"),
        ("show", [], "say which update with --order"),
        ("release", ["--order", "nonsense"], "no update of an order 'nonsense'"),
    ):
        refused = quarantine(scene, action, *flags)
        assert refused.returncode == 1
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr
    refused = quarantine(scene, "burn")
    assert refused.returncode == 2
    assert "list, show, release, drop" in refused.stderr
    missing = scene.command("quarantine", "drop", "--state-dir", scene.folder / "elsewhere")
    assert (missing.returncode, (scene.folder / "elsewhere").exists()) == (1, False)


def test_other_bytes_for_a_stored_order_are_refused_and_on_record(
    scene: Scene, peers: dict[int, Peer]
) -> None:
    """The first update stands; the second is an incident, once however often it comes."""
    opened = cohort(peers, *CLIENTS)
    first, second = payload_of(changed(opened.base)), payload_of(changed(opened.base, by=0.02))
    assert peers[0].upload(opened.orders[0], first).receipt == pb.RECEIPT_STORED
    for _ in range(2):
        answer = peers[0].upload(opened.orders[0], second)
        assert answer.receipt == pb.RECEIPT_REFUSED
        assert "the first one stands" in answer.reason
    opened.settle(1, 2, 3, 4)
    cohort(peers, *CLIENTS)
    entry = entry_of(scene.history(), opened.orders[0])
    assert {update["verdict"] for update in entry["updates"]} == {"COUNTED"}
    # That it alone changes the model's buffers is no incident.
    (incident,) = entry["incidents"]
    assert (incident["kind"], incident["client"]) == ("update-contradicted", 0)
    assert incident["first"] == digest_bytes(first)
    assert incident["second"] == digest_bytes(second)
