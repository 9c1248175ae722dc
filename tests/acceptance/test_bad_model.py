"""A global model that goes bad under real clients: one of those that take part is a peer's hand."""

from tests.acceptance.federation import expect_clean_exits, start_client, start_server
from tests.integration.peer import Peer, changed, open_round, payload_of
from tests.processes import Scene

CLIENTS = (0, 1)
HAND = 2


def test_real_clients_go_on_from_the_model_before(scene: Scene) -> None:
    """Nobody has lost a thing, and the run ends as well as if nothing had been."""
    server = start_server(scene, *("--rounds", 4, "--min-clients", 3, "--require-all"))
    clients = [start_client(scene, client_id, server.address) for client_id in CLIENTS]
    hand = Peer(server.address, HAND)
    while True:
        opened = open_round({HAND: hand})
        order, state = opened.orders[HAND], opened.base
        if (order.round, order.attempt) == (3, 1):
            # With the weight of a thousand others it answers class 0 to everything.
            state = changed(state)
            state["3.bias"][0] += 100
            hand.upload(order, payload_of(state), num_examples=100_000)
            break
        hand.upload(order, payload_of(state), num_examples=1, num_steps=1)
    for attempt in ((3, 2), (4, 2)):
        opened = open_round({HAND: hand}, attempt=attempt)
        hand.upload(opened.orders[HAND], payload_of(opened.base), num_examples=1, num_steps=1)
    hand.pull()
    expect_clean_exits(server, *clients)
    hand.close()

    history = scene.history()
    assert [(entry["round"], entry["attempt"], entry["phase"]) for entry in history] == [
        (1, 1, "DONE"),
        (2, 1, "DONE"),
        (3, 1, "ROLLED_BACK"),
        (3, 2, "DONE"),
        (4, 1, "ABANDONED"),
        (4, 2, "DONE"),
    ]
    assert history[3]["base_digest"] == history[1]["model_digest"]
    kinds = [incident["kind"] for entry in history for incident in entry["incidents"]]
    # A client may have trained for the attempt that was abandoned, or said that the model it got
    # was broken; none has lost its state.
    by_clients = ("update-late", "training-diagnosed", "cause-shared")
    assert [kind for kind in kinds if kind not in by_clients] == [
        "evaluation-collapsed",
        "model-rolled-back",
        "round-abandoned",
    ]
    assert history[2]["evaluation"]["accuracy"] < 0.6 < history[-1]["evaluation"]["accuracy"]
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert verified.returncode == 0, verified.stdout
