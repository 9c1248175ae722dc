"""A run that fails: every client learns it, says it and ends with exit code 1."""

from shared.pb import federation_pb2 as pb
from tests.acceptance.federation import start_client, start_server
from tests.integration.peer import Peer
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
