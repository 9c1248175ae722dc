"""A run that fails: every client learns it, says it and ends with exit code 1."""

import torch

from fedrounds.wire.pb import federation_pb2 as pb
from tests.acceptance.federation import start_client, start_server
from tests.integration.peer import Peer, changed, payload_of
from tests.processes import Scene


def test_clients_of_a_run_that_failed_say_so_and_exit_with_1(scene: Scene) -> None:
    """One of two clients gives up in the only attempt; the other's update can't save the run."""
    server = start_server(scene, "--min-clients", 2, "--max-attempts", 1, "--farewell", 120)
    client = start_client(scene, 0, server.address)
    peer = Peer(server.address, 1)
    order = peer.pull_order()
    client.wait_for_line("update stored")
    peer.report(order, gave_up=True)
    while (work := peer.pull()).state != pb.WORK_STATE_FINISHED:
        continue
    peer.close()
    assert work.outcome == pb.RUN_OUTCOME_FAILED
    assert work.failure == pb.RUN_FAILURE_TOO_FEW_UPDATES
    assert (client.wait(), server.wait()) == (1, 1)
    assert client.count_lines("^fedclient: the run failed: too few clients delivered") == 1
    assert client.count_lines("the run is done") == 0
    assert server.count_lines("fedserver: round 1 failed 1 times") == 1


def test_a_run_whose_updates_are_refused_says_so_and_asks_no_oftener_than_it_may(
    scene: Scene,
) -> None:
    """Each attempt asks the client once; the reason names the client and what was refused."""
    server = start_server(scene, *("--min-clients", 1, "--max-attempts", 3, "--farewell", 120))
    peer = Peer(server.address, 0)
    attempts = []
    while (work := peer.pull()).state != pb.WORK_STATE_FINISHED:
        if work.state == pb.WORK_STATE_ORDER:
            attempts.append(work.order.attempt)
            state = changed(peer.base_of(work.order))
            state["0.weight"][0, 0] = torch.nan
            assert peer.upload(work.order, payload_of(state)).receipt == pb.RECEIPT_REFUSED
    peer.close()
    assert attempts == [1, 2, 3]
    assert work.failure == pb.RUN_FAILURE_UPDATES_REFUSED
    assert server.wait() == 1
    reason = (
        "0 of 1 updates are there, and none can still come; the update of client 0 was refused: "
        "tensor '0.weight' holds nan"
    )
    assert server.count_lines(f"WARNING round-failed .*{reason}") == 3
    assert server.count_lines(f"^fedserver: round 1 failed 3 times, .*: {reason}") == 1
