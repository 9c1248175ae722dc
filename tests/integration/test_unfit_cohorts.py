"""Updates that a strategy can't be applied to: the attempt fails in words, the run goes on."""

from tests.integration.peer import Peer, changed, open_round, payload_of
from tests.processes import Scene

LOSSES = {0: 0.5, 1: 1.5}


def test_a_round_whose_updates_dont_fit_the_strategy_fails_and_is_tried_again(
    scene: Scene,
) -> None:
    """q-FedAvg, and a client that says nothing of the global model's loss; then it does."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 2, "--strategy", "qfedavg"),
        *("--evaluate-on-clients", "--farewell", 0, "--stall-after", 3600, "--lease", 3600),
    )
    server.wait_for_line("fedserver listening on")
    peers = {one: Peer(server.address, one) for one in LOSSES}
    for attempt in (1, 2):
        opened = open_round(peers)
        for one, loss in LOSSES.items():
            told = {"global_loss": loss, "global_accuracy": 0.5} if one or attempt == 2 else {}
            peers[one].upload(
                opened.orders[one],
                payload_of(changed(opened.base)),
                metrics={"loss": 0.5, "accuracy": 0.75, **told},
            )
    assert open_round(peers).orders[0].round == 2
    first, second, _ = scene.history()
    assert (first["phase"], second["phase"]) == ("FAILED", "DONE")
    (incident,) = first["incidents"]
    assert incident["kind"] == "round-failed"
    assert "qfedavg needs each client's loss of the global model" in incident["reason"]
    for peer in peers.values():
        peer.close()
