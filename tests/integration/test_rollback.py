"""Clients that agree on a cause change the run; a bad global model is taken back."""

import json
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from fedrounds.diagnosis.values import Cause, Experiment, ExperimentName, Remedy, RemedyKind
from fedrounds.wire.diagnosis import diagnosis_message
from fedrounds.wire.pb import federation_pb2 as pb
from tests.factories import make_diagnosis
from tests.integration.peer import OpenRound, Peer, State, changed, entry_of, open_round, payload_of
from tests.processes import Scene, Server

CLIENTS = (0, 1)
LR = 0.25

Connect = Callable[..., dict[int, Peer]]


@pytest.fixture
def connect(scene: Scene) -> Iterator[Connect]:
    """Give a function that starts a server with these flags and returns its two clients."""
    connected: dict[int, Peer] = {}

    def start(*flags: str | float) -> dict[int, Peer]:
        server = scene.server(
            *("--task", "tests.tiny_task:tiny", "--rounds", 100, "--min-clients", len(CLIENTS)),
            *("--stall-after", 3600, "--lease", 3600, "--lr", LR),
            *flags,
        )
        server.wait_for_line("fedserver listening on")
        connected.update({client_id: Peer(server.address, client_id) for client_id in CLIENTS})
        return connected

    yield start
    for peer in connected.values():
        peer.close()


def server_of(scene: Scene) -> Server:
    """Return the scene's server."""
    (server,) = (process for process in scene.processes if isinstance(process, Server))
    return server


def report(
    opened: OpenRound,
    cause: Cause,
    *tried: Experiment,
    clients: Sequence[int] = CLIENTS,
    gave_up: bool = False,
) -> None:
    """Let clients report a cause, and perhaps that no update comes."""
    diagnosis = make_diagnosis(cause=cause, experiments=tried, remedy=Remedy(kind=RemedyKind.NONE))
    incident = pb.Incident(
        sequence=1,
        kind=pb.INCIDENT_KIND_TRAINING_DIAGNOSED,
        diagnosis=diagnosis_message(diagnosis),
    )
    for client_id in clients:
        opened.peers[client_id].report(opened.orders[client_id], incidents=[incident])
    for client_id in clients if gave_up else ():
        opened.peers[client_id].report(opened.orders[client_id], gave_up=True)


def attempt_of(opened: OpenRound) -> tuple[int, int]:
    """Return a round and its attempt."""
    order = opened.orders[0]
    return order.round, order.attempt


def rates(opened: OpenRound) -> set[float]:
    """Return the rates that a round's clients are to train with."""
    return {order.training.lr for order in opened.orders.values()}


def poisoned(base: State) -> State:
    """Return a model that answers class 0 to everything: finite, and near enough to be taken."""
    state = changed(base)
    state["3.bias"][0] += 100
    return state


def deliver(opened: OpenRound, make: Callable[[State], State] = changed) -> None:
    """Upload the same update for every client of a round."""
    payload = payload_of(make(opened.base))
    for client_id, peer in opened.peers.items():
        assert peer.upload(opened.orders[client_id], payload).receipt == pb.RECEIPT_STORED


def same(state: State, other: State) -> bool:
    """Whether two models hold the same numbers."""
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_clients_that_agree_on_the_rate_lower_it_until_rounds_go_well(
    scene: Scene, connect: Connect
) -> None:
    """In the next attempt and the next round's orders; a good round takes it back."""
    peers = connect()
    first = open_round(peers)
    healing = Experiment(name=ExperimentName.LOWER_RATE, value=0.1, is_healed=True)
    report(first, Cause.LEARNING_RATE, healing, gave_up=True)
    again = open_round(peers)
    assert (attempt_of(again), rates(again)) == ((1, 2), {LR * 0.1})
    # One client says so again: nothing is lowered further, nor taken back.
    report(again, Cause.LEARNING_RATE, healing, clients=[1])
    deliver(again)
    second = open_round(peers)
    assert (attempt_of(second), rates(second)) == ((2, 1), {LR * 0.1})
    expected = [LR * 0.2, LR * 0.4, LR * 0.8, LR]
    factors: list[float] = []
    for _ in expected:
        deliver(second)
        second = open_round(peers)
        factors += rates(second)
    assert factors == pytest.approx(expected)

    history = scene.history()
    shared = [
        incident for incident in history[0]["incidents"] if incident["kind"] == "cause-shared"
    ]
    assert [
        (incident["cause"], incident["clients"], incident["answers"]) for incident in shared
    ] == [("learning-rate", [0, 1], 2)]
    in_force = [entry["adjustments"].get("lr_factor", 1) for entry in history]
    assert in_force == pytest.approx([1, 0.1, 0.1, 0.2, 0.4, 0.8, 1])
    server_of(scene).wait_for_line("cause-shared.*learning-rate.*rate times 0.1")
    shown = scene.command("show", "--state-dir", scene.folder / "server", "--round", "1").stdout
    words = " ".join(shown.split())
    assert "clients 0, 1 of 2 that answered report learning-rate: rate times 0.1" in words
    assert "changed for this attempt: rate times 0.1" in words


def test_they_agree_though_the_first_to_give_up_ends_the_attempt(connect: Connect) -> None:
    """What the others say of it afterwards counts in the next one."""
    peers = connect()
    first = open_round(peers)
    report(first, Cause.LEARNING_RATE, clients=[0], gave_up=True)
    again = open_round(peers, attempt=(1, 2))
    assert rates(again) == {LR}
    report(first, Cause.LEARNING_RATE, clients=[1])
    again.peers[0].report(again.orders[0], gave_up=True)
    assert rates(open_round(peers, attempt=(1, 3))) == {LR / 2}


def test_clients_that_agree_on_exploding_gradients_get_them_clipped(connect: Connect) -> None:
    """At the median of the norms that healed them."""
    peers = connect()
    opened = open_round(peers)
    for client, norm in ((0, 2.0), (1, 3.0)):
        healing = Experiment(name=ExperimentName.CLIPPED_GRADIENT, value=norm, is_healed=True)
        report(opened, Cause.EXPLODING_GRADIENT, healing, clients=[client])
    deliver(opened)
    after = open_round(peers)
    assert {order.training.clip_norm for order in after.orders.values()} == {2.5}
    assert rates(after) == {LR}


def test_a_bad_first_model_is_drawn_anew(scene: Scene, connect: Connect) -> None:
    """Twice, each time another model; then the draw stays as it is."""
    peers = connect()
    bases = []
    for attempt in range(1, 5):
        opened = open_round(peers)
        assert attempt_of(opened) == (1, attempt)
        bases.append(opened.base)
        if attempt < 4:
            report(opened, Cause.BAD_INITIALISATION, gave_up=True)
    assert not same(bases[0], bases[1])
    assert not same(bases[1], bases[2])
    assert same(bases[2], bases[3])
    deliver(opened)
    open_round(peers)
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert verified.returncode == 0, verified.stdout


def test_nothing_is_changed_where_that_is_switched_off(scene: Scene, connect: Connect) -> None:
    """It is said all the same."""
    peers = connect("--max-adjustments", 0)
    opened = open_round(peers)
    report(opened, Cause.LEARNING_RATE)
    deliver(opened)
    assert rates(open_round(peers)) == {LR}
    (shared,) = (
        incident
        for incident in scene.history()[0]["incidents"]
        if incident["kind"] == "cause-shared"
    )
    assert "--max-adjustments is 0" in shared["change"]


def test_a_bad_model_is_taken_back_and_its_round_repeated(scene: Scene, connect: Connect) -> None:
    """From the last good model, with half the rate, twice at most; all of it is on record."""
    peers = connect("--keep-updates", "all")
    first = open_round(peers)
    deliver(first)
    second = open_round(peers)
    good = second.base
    for attempt in (1, 2):
        assert rates(second) == {LR * 0.5 ** (attempt - 1)}
        deliver(second, poisoned)
        second = open_round(peers, attempt=(2, attempt + 1))
        assert same(second.base, good)
    # A third time it stands.
    deliver(second, poisoned)
    third = open_round(peers)
    server_of(scene).wait_for_line("evaluation-collapsed", times=3)
    assert attempt_of(third)[0] == 3
    assert not same(third.base, good)

    history = scene.history()
    done = [(entry["round"], entry["attempt"]) for entry in history if entry["phase"] == "DONE"]
    assert done == [(1, 1), (2, 3)]
    undone = [entry for entry in history if entry["phase"] == "ROLLED_BACK"]
    assert [(entry["round"], entry["attempt"]) for entry in undone] == [(2, 1), (2, 2)]
    for entry in undone:
        kinds = [incident["kind"] for incident in entry["incidents"]]
        assert kinds == ["evaluation-collapsed", "model-rolled-back"]
        assert entry["incidents"][1]["to"] == history[0]["model_digest"]
        assert {order["state"] for order in entry["orders"]} == {"COUNTED"}
    abandoned = [entry for entry in history if entry["phase"] == "ABANDONED"]
    assert {entry["round"] for entry in abandoned} == {3}
    assert {order["state"] for entry in abandoned for order in entry["orders"]} == {"ABANDONED"}
    stood = [
        incident
        for incident in history[3]["incidents"]
        if incident["kind"] == "evaluation-collapsed"
    ]
    assert "it stands, --max-rollbacks allows no more" in stood[0]["reason"]
    json.dumps(history, allow_nan=False)

    state_dir = scene.folder / "server"
    verified = scene.command("verify", "--state-dir", state_dir)
    assert verified.returncode == 0, verified.stdout
    assert "2 of 2 re-aggregated" in verified.stdout
    out = scene.folder / "exported.safetensors"
    scene.command("export", "--state-dir", state_dir, "--round", "2", "--out", out)
    assert (
        out.read_bytes()
        == (state_dir / "models" / f"{history[3]['model_digest']}.safetensors").read_bytes()
    )
    shown = " ".join(scene.command("show", "--state-dir", state_dir, "--round", "2").stdout.split())
    assert "Attempt 1: rolled back" in shown
    assert "the model was taken back; the one before it is in its place" in shown
    assert "its loss is" in shown


def test_a_model_that_clients_call_bad_is_taken_back(scene: Scene, connect: Connect) -> None:
    """Nobody else could: whoever was sent it says so, and the round that made it is repeated once.

    What only one client says is not acted on.
    """
    peers = connect("--max-rollbacks", 1)
    first = open_round(peers)
    deliver(first)
    second = open_round(peers)
    report(second, Cause.RECEIVED_MODEL, clients=[0], gave_up=True)
    report(second, Cause.UNKNOWN, clients=[1], gave_up=True)
    second = open_round(peers, attempt=(2, 2))
    assert not same(second.base, first.base)
    report(second, Cause.RECEIVED_MODEL, gave_up=True)
    again = open_round(peers, attempt=(1, 2))
    assert same(again.base, first.base)
    assert rates(again) == {LR / 2}
    deliver(again)
    third = open_round(peers, attempt=(2, 3))
    # It may be taken back once.
    report(third, Cause.RECEIVED_MODEL, gave_up=True)
    assert same(open_round(peers, attempt=(2, 4)).base, third.base)

    history = scene.history()
    assert [(entry["round"], entry["phase"]) for entry in history[:2]] == [
        (1, "ROLLED_BACK"),
        (1, "DONE"),
    ]
    kinds = [incident["kind"] for incident in history[0]["incidents"]]
    assert kinds == ["model-rolled-back"]
    changes = [
        incident["change"]
        for entry in history
        for incident in entry["incidents"]
        if incident["kind"] == "cause-shared"
    ]
    assert changes == [
        "the model is taken back, its round repeated",
        "nothing is changed: no setting of a round would help",
    ]
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert verified.returncode == 0, verified.stdout


def test_a_server_optimizer_that_overflows_has_its_round_repeated_with_half_the_rate(
    scene: Scene, connect: Connect
) -> None:
    """Its moments are squares: of a change by 1e30 they aren't finite, and no model is made."""
    peers = connect("--strategy", "fedadam", "--max-delta-norm", 1e35)
    first = open_round(peers)
    deliver(first, lambda base: changed(base, by=1e30))
    again = open_round(peers, attempt=(1, 2))
    assert rates(again) == {LR / 2}
    assert same(again.base, first.base)
    deliver(again)
    assert attempt_of(open_round(peers)) == (2, 1)
    (failed,) = (incident for incident in scene.history()[0]["incidents"])
    assert failed["kind"] == "round-failed"


def test_a_bad_model_stands_where_that_is_switched_off(scene: Scene, connect: Connect) -> None:
    """It is said all the same."""
    peers = connect("--max-rollbacks", 0)
    deliver(open_round(peers))
    second = open_round(peers)
    deliver(second, poisoned)
    third = open_round(peers)
    server_of(scene).wait_for_line("evaluation-collapsed.*it stands")
    deliver(third)
    assert attempt_of(open_round(peers)) == (4, 1)


def test_a_bad_evaluation_takes_nothing_back_under_fedbn(scene: Scene, connect: Connect) -> None:
    """The server's model lacks its norm layers: its evaluation means nothing."""
    peers = connect("--strategy", "fedbn")
    deliver(open_round(peers))
    second = open_round(peers)
    deliver(second, poisoned)
    third = open_round(peers)
    server_of(scene).wait_for_line("evaluated round=2")
    deliver(third)
    assert attempt_of(open_round(peers)) == (4, 1)
    kinds = [incident["kind"] for entry in scene.history() for incident in entry["incidents"]]
    assert kinds == []


def test_a_repeated_round_has_half_the_norm_band(scene: Scene) -> None:
    """An update 12 times its cohort's is inside the band of four others, and outside half of it."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 100, "--min-clients", 5),
        *("--min-updates", 4, "--stall-after", 3600, "--lease", 3600),
    )
    peers = {client_id: Peer(server.address, client_id) for client_id in range(5)}
    deliver(open_round(peers, attempt=(1, 1)))
    deliver(open_round(peers), poisoned)
    again = open_round(peers, attempt=(2, 2))
    for client_id, peer in peers.items():
        by = 0.12 if client_id == 4 else 0.01
        peer.upload(again.orders[client_id], payload_of(changed(again.base, by)))
    open_round({client_id: peers[client_id] for client_id in range(4)}, attempt=(3, 2))
    entry = entry_of(scene.history(), again.orders[0])
    assert {update["client"]: update["verdict"] for update in entry["updates"]} == {
        **dict.fromkeys(range(4), "COUNTED"),
        4: "EXCLUDED",
    }
    for peer in peers.values():
        peer.close()


def test_clients_take_back_one_model_and_not_its_predecessor_too(
    scene: Scene, connect: Connect
) -> None:
    """A round that is repeated for its own bad model blames nobody: older models may be gone."""
    peers = connect("--max-rollbacks", 2, "--keep-rounds", 1)
    deliver(open_round(peers))
    second = open_round(peers)
    deliver(second)
    report(open_round(peers), Cause.RECEIVED_MODEL, gave_up=True)
    again = open_round(peers, attempt=(2, 2))
    report(again, Cause.RECEIVED_MODEL, gave_up=True)
    once_more = open_round(peers, attempt=(2, 3))
    assert same(once_more.base, second.base)
    deliver(once_more)
    open_round(peers, attempt=(3, 2))
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert verified.returncode == 0, verified.stdout
