"""What becomes of each entry of a state_dict, through a real server and real clients."""

import pytest
import torch

from fedrounds.tensors.codec import decode_state
from fedrounds.wire.pb import federation_pb2 as pb
from tests.entry_tasks import Whole
from tests.integration.peer import Peer, State, changed, open_round, payload_of
from tests.processes import Scene
from tests.tiny_task import tiny


def trained(scene: Scene, task: str, *flags: str) -> tuple[State, list[dict[str, object]]]:
    """Return the final model of two rounds with three clients, and the history."""
    server = scene.server(
        *("--task", f"tests.entry_tasks:{task}", "--rounds", 2, "--min-clients", 3, "--epochs", 1),
        *("--batch-size", 8, "--lr", 0.05, "--num-partitions", 3, "--max-attempts", 1),
        *flags,
    )
    client = scene.client("0-2", server.address, "--task", f"tests.entry_tasks:{task}")
    assert server.wait() == 0, scene.logs()
    assert client.wait() == 0, scene.logs()
    model = decode_state((scene.folder / "server" / "model.safetensors").read_bytes())
    return model, scene.history()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--compression", "top-k", "--compression-fraction", "0.2", "--strategy", "fedbn"),
        ("--compression", "int8", "--strategy", "median"),
    ],
    ids=["whole", "top-k-fedbn", "int8-median"],
)
def test_a_model_with_every_kind_of_entry_trains(scene: Scene, flags: tuple[str, ...]) -> None:
    """Nobody is refused, excluded or suspended, and each entry is what the table says.

    The clients of tiny have 4, 5 and 6 batches of 8; the norm is called four times a step (twice
    plainly, once checkpointed, and once more when that is computed again).
    """
    model, history = trained(scene, "whole", *flags)
    assert [len(entry["updates"]) for entry in history] == [3, 3]  # type: ignore[arg-type]
    assert [entry["incidents"] for entry in history] == [[], []]
    start = Whole().state_dict()
    steps_of_longest = 6
    if "fedbn" not in flags:
        assert model["norm.num_batches_tracked"] == 2 * 4 * steps_of_longest
        assert not torch.equal(model["norm.running_mean"], start["norm.running_mean"])
    for name in ("counter", "queue", "mask", "causal", "whole", "expanded", "narrow"):
        assert torch.equal(model[name], start[name]), name
    assert float(model["smallest"]) < 0
    assert torch.equal(model["tied.weight"], model["again.weight"])
    for name, tensor in model.items():
        assert tensor.dtype == start[name].dtype
        assert name == "causal" or bool(torch.isfinite(tensor).all()), name
    done = scene.command("verify", "--state-dir", scene.folder / "server")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "flags", [("--keep-updates", "all"), ("--compression", "top-k", "--strategy", "ditto")]
)
def test_declared_entries_are_kept_or_stay_at_the_client(
    scene: Scene, flags: tuple[str, ...]
) -> None:
    """Local entries are in no update, last in the client's state; `max` and `keep` are obeyed."""
    model, history = trained(scene, "declared", *flags)
    assert [entry["incidents"] for entry in history] == [[], []]
    assert model["counter"] == 2 * 6
    assert bool(model["mask"].any())
    assert model["queue"].tolist() == [0, 0]
    assert torch.equal(model["wide"], torch.zeros(3, dtype=torch.float64))
    kept = []
    for client in range(3):
        folder = scene.folder / "client-0-2" / "states" / str(client)
        (newest,) = (
            path for path in folder.glob("*.local.safetensors") if f"-r2-a1-c{client}-" in path.name
        )
        kept.append(decode_state(newest.read_bytes()))
        assert kept[-1].keys() == {"queue", "head.weight", "head.bias"}
        assert not torch.equal(kept[-1]["head.weight"], model["head.weight"])
    # Client 0 has 4 batches of 8 a round, which the queue counts modulo 7.
    assert kept[0]["queue"][0] == (2 * 4 * 8) % 7
    assert not torch.equal(kept[0]["head.weight"], kept[1]["head.weight"])
    for payload in (scene.folder / "server" / "spool").glob("*"):
        sent = decode_state(payload.read_bytes())
        for name in ("queue", "head.weight", "head.bias"):
            assert torch.equal(sent[name], model[name]), name


def test_one_of_five_clients_cannot_ruin_the_running_statistics(scene: Scene) -> None:
    """A running mean of 1e30 counts bounded, with an incident; its client is asked again."""
    server = scene.server(
        *("--task", "tests.tiny_task:tiny", "--rounds", 3, "--min-clients", 5, "--min-updates", 5),
        *("--farewell", 0, "--stall-after", 3600, "--lease", 3600, "--norm-band", 0),
    )
    server.wait_for_line("fedserver listening on")
    peers = {client_id: Peer(server.address, client_id) for client_id in range(5)}
    kinds = peers[0].register(num_examples=[10]).entry_kinds
    assert kinds["1.running_mean"] == pb.ENTRY_KIND_MEAN
    assert kinds["1.num_batches_tracked"] == pb.ENTRY_KIND_MAX
    assert kinds["0.weight"] == pb.ENTRY_KIND_PARAMETER
    assert kinds.keys() == tiny.build_model().state_dict().keys()
    for _ in range(2):
        opened = open_round(peers)
        for client, peer in peers.items():
            state = changed(opened.base)
            if client == 4:
                state["1.running_mean"] += 1e30
            answer = peer.upload(opened.orders[client], payload_of(state))
            assert answer.receipt == pb.RECEIPT_STORED
    opened = open_round(peers)
    assert float(opened.base["1.running_mean"].abs().max()) < 1
    history = scene.history()
    for entry in history[:2]:
        (incident,) = entry["incidents"]
        assert incident["kind"] == "buffer-bounded"
        assert incident["client"] == 4
        assert incident["tensor"] == "1.running_mean"
        assert 0 < incident["share"] < 1e-20
    for peer in peers.values():
        peer.close()
