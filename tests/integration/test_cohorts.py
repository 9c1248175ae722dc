"""A cohort chosen by what clients have done: round after round, as the server hands out orders."""

from fedrounds.wire.pb import federation_pb2 as pb
from tests.integration.peer import Peer, payload_of
from tests.processes import Scene, wait_until

CLIENTS = (0, 1, 2)


def test_in_turns_each_client_is_asked_before_any_is_asked_again(scene: Scene) -> None:
    """One of three a round: in three rounds each is asked once, in the next three once more."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 7, "--farewell", 0),
        *("--min-clients", len(CLIENTS), "--min-updates", 1, "--clients-per-round", 1),
        *("--cohort", "round-robin", "--stall-after", 3600, "--lease", 3600),
    )
    server.wait_for_line("fedserver listening on")
    peers = [Peer(server.address, client_id) for client_id in CLIENTS]
    asked: list[int] = []

    def somebody_is_asked() -> bool:
        for peer in peers:
            work = peer.pull(wait_s=0)
            if work.state == pb.WORK_STATE_ORDER:
                peer.upload(work.order, payload_of(peer.base_of(work.order)))
                asked.append(peer.client_id)
                return True
        return False

    for number in range(1, 7):
        wait_until(somebody_is_asked, what=f"the order of round {number}")
    assert sorted(asked[:3]) == sorted(asked[3:]) == list(CLIENTS)
    for peer in peers:
        peer.close()


def test_a_round_waits_for_as_many_clients_as_it_needs_updates(scene: Scene) -> None:
    """Also where fewer are enough to begin: two of three asked for can't be what it rests on."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1, "--farewell", 0),
        *("--min-clients", 2, "--min-updates", 3, "--stall-after", 3600, "--lease", 3600),
    )
    server.wait_for_line("fedserver listening on")
    peers = [Peer(server.address, client_id) for client_id in CLIENTS[:2]]
    server.wait_for_line("waiting for clients: 2 of 3 are here")
    assert scene.history() == []
    peers.append(Peer(server.address, CLIENTS[2]))
    for peer in peers:
        order = peer.pull_order()
        peer.upload(order, payload_of(peer.base_of(order)))
    assert server.wait() == 0
    (entry,) = scene.history()
    assert {update["client"] for update in entry["updates"]} == set(CLIENTS)
    for peer in peers:
        peer.close()
