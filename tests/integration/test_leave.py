"""Leave, and what the others learn: nobody waits for who isn't there, and nobody is called late."""

from collections.abc import Iterator

import pytest

from shared.pb import federation_pb2 as pb
from tests.integration.peer import OpenRound, Peer, changed, entry_of, open_round, payload_of
from tests.processes import Scene, Server


@pytest.fixture(scope="module")
def pair_server(module_scene: Scene) -> Server:
    """Give a server whose rounds need the updates of both of its two clients."""
    started = module_scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 1000, "--max-attempts", 1000),
        *("--min-clients", 2, "--stall-after", 3600, "--lease", 3600),
    )
    started.wait_for_line("fedserver listening on")
    return started


@pytest.fixture
def pair(pair_server: Server) -> Iterator[OpenRound]:
    """Give a round of two clients, their orders just pulled."""
    peers = {one: Peer(pair_server.address, one) for one in (0, 1)}
    yield open_round(peers)
    for peer in peers.values():
        peer.close()


def open_next_attempt(failing: OpenRound) -> OpenRound:
    """Pull the orders of the attempt that follows; by then the one before has failed."""
    order = failing.orders[0]
    return open_round(failing.peers, attempt=(order.round, order.attempt + 1))


def test_in_a_failed_attempt_the_good_client_isnt_called_late(
    pair: OpenRound, module_scene: Scene
) -> None:
    """Both answers name the attempt's failure, and the history holds nothing against the client."""
    good, order = pair.peers[0], pair.orders[0]
    payload = payload_of(changed(pair.base))
    pair.peers[1].report(pair.orders[1], gave_up=True)
    following = open_next_attempt(pair)
    report = pb.ReportProgressRequest(session_id=good.session_id, order_id=order.order_id)
    answer = good.stub.ReportProgress(report)
    assert answer.directive == pb.DIRECTIVE_ABANDON
    assert answer.order_end == pb.ORDER_END_ATTEMPT_FAILED
    for _ in range(2):
        receipt = good.upload(order, payload)
        assert receipt.receipt == pb.RECEIPT_LATE
        assert receipt.order_end == pb.ORDER_END_ATTEMPT_FAILED
    given_up = pair.peers[1].upload(pair.orders[1], payload)
    assert given_up.order_end == pb.ORDER_END_GIVEN_UP
    following.settle()
    incidents = entry_of(module_scene.history(), order)["incidents"]
    kinds = [(one["kind"], one["client"]) for one in incidents]
    assert kinds == [("round-failed", None), ("update-late", 1)]


def test_an_update_that_was_stored_in_a_failed_attempt_isnt_called_late(pair: OpenRound) -> None:
    """Sent again after the attempt failed, it is answered with how its order ended."""
    assert pair.settle(0) == [pb.RECEIPT_STORED]
    pair.peers[1].report(pair.orders[1], gave_up=True)
    following = open_next_attempt(pair)
    again = pair.peers[0].upload(pair.orders[0], payload_of(pair.base))
    assert (again.receipt, again.order_end) == (pb.RECEIPT_LATE, pb.ORDER_END_ATTEMPT_FAILED)
    following.settle()
