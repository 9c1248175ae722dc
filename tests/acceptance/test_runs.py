"""Runs from the first round to the last: what comes out, and that it comes out again."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrounds.tensors.codec import decode_state, digest_file
from tests.acceptance.conftest import CLIENTS, NUM_ROUNDS, Undisturbed, run_flags
from tests.acceptance.federation import (
    TINY,
    expect_clean_exits,
    incident_kinds,
    start_client,
    start_server,
    verdicts,
)
from tests.processes import Scene
from tests.tiny_task import num_examples_of, tiny

ROUNDS = range(1, NUM_ROUNDS[TINY] + 1)


def model_of(folder: Path, digest: str) -> dict[str, Tensor]:
    """Return a global model of a server's state-dir."""
    return decode_state((folder / "models" / f"{digest}.safetensors").read_bytes())


def plain_mean(entry: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Return the mean of a round's kept updates, as the paper has it: whole tensors in float64."""
    weights = [update["num_examples"] for update in entry["updates"]]
    orders = {order["client"]: order["order_id"] for order in entry["orders"]}
    states = [
        decode_state(
            (folder / "spool" / f"{orders[update['client']]}.{update['digest']}").read_bytes()
        )
        for update in entry["updates"]
    ]
    mean = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        if first.is_floating_point():
            weighted = [w * value.double() for w, value in zip(weights, values, strict=True)]
            mean[name] = (sum(weighted, torch.zeros(())) / sum(weights)).to(first.dtype)
        else:
            mean[name] = torch.stack(values).amax(0)
    return mean


def test_a_run_counts_everybody_in_every_round_and_ends_by_itself(
    undisturbed: Undisturbed,
) -> None:
    """Server and clients end with 0; each round has a model, a verdict for all and no incident."""
    run = undisturbed(TINY)
    history = run.history
    assert [(entry["round"], entry["attempt"], entry["phase"]) for entry in history] == [
        (number, 1, "DONE") for number in ROUNDS
    ]
    assert verdicts(history) == [
        (number, client, "COUNTED") for number in ROUNDS for client in CLIENTS
    ]
    assert incident_kinds(history) == []
    for entry in history:
        assert entry["cohort"] == list(CLIENTS)
        examples = {update["client"]: update["num_examples"] for update in entry["updates"]}
        assert examples == {client_id: num_examples_of(client_id) for client_id in CLIENTS}
        assert all(set(update["metrics"]) >= {"accuracy", "loss"} for update in entry["updates"])
        assert entry["started_at"] < entry["closed_at"] < entry["finished_at"]
    # Three well separated classes: whoever learns gets nearly all of them right.
    assert history[-1]["evaluation"]["accuracy"] > 0.9


def test_each_model_is_the_weighted_mean_of_its_rounds_updates(undisturbed: Undisturbed) -> None:
    """Every round begins from the model before it and ends, to the bit, in the plain mean."""
    run = undisturbed(TINY)
    for before, after in zip(run.history, run.history[1:], strict=False):
        assert after["base_digest"] == before["model_digest"]
    for entry in run.history:
        model = model_of(run.folder, entry["model_digest"])
        expected = plain_mean(entry, run.folder)
        assert model.keys() == expected.keys() == tiny.build_model().state_dict().keys()
        for name, tensor in expected.items():
            assert torch.equal(model[name], tensor), f"round {entry['round']}, {name}"


def test_the_final_model_is_a_file_that_any_tool_reads(undisturbed: Undisturbed) -> None:
    """The exported model is the last round's, and loads into the task's own module."""
    run = undisturbed(TINY)
    exported = run.folder / "model.safetensors"
    assert digest_file(exported) == run.history[-1]["model_digest"]
    tiny.build_model().load_state_dict(decode_state(exported.read_bytes()))


def arrivals(history: list[dict[str, Any]]) -> list[list[int]]:
    """Return the clients of each round in the order in which their updates came."""
    return [
        [
            update["client"]
            for update in sorted(entry["updates"], key=lambda update: update["received_at"])
        ]
        for entry in history
    ]


def test_the_same_seed_gives_the_same_models_in_whatever_order_clients_come(
    scene: Scene, undisturbed: Undisturbed
) -> None:
    """Started the other way round, and with the first now the slowest, nothing changes."""
    server = start_server(scene, *run_flags(TINY, 0))
    slow_to_fast = dict(zip(CLIENTS, ("0.03", "0.01", "0"), strict=True))
    clients = [
        start_client(scene, client_id, server.address, TINY_STEP_S=slow_to_fast[client_id])
        for client_id in reversed(CLIENTS)
    ]
    expect_clean_exits(server, *clients)
    expected = undisturbed(TINY).history
    history = scene.history()
    assert arrivals(history) != arrivals(expected), "they came in the same order: nothing is shown"
    assert [entry["model_digest"] for entry in history] == [
        entry["model_digest"] for entry in expected
    ]
    assert [entry["evaluation"] for entry in history] == [entry["evaluation"] for entry in expected]


def test_without_a_doctor_clients_that_arent_finite_send_nothing_and_the_others_go_on(
    scene: Scene,
) -> None:
    """The history names client, step and tensor; the model stays finite; nobody crashes."""
    server = start_server(
        scene, *("--rounds", 2, "--min-clients", 4, "--min-updates", 2, "--seed", 5)
    )
    faults = {0: "", 1: "", 2: "pixel", 3: "gradient"}
    clients = [
        start_client(scene, client_id, server.address, "--doctor", "off", TINY_BAD=fault)
        for client_id, fault in faults.items()
    ]
    expect_clean_exits(server, *clients)
    history = scene.history()
    names = tiny.build_model().state_dict().keys()
    assert len(history) == 2
    for entry in history:
        states = {order["client"]: order["state"] for order in entry["orders"]}
        assert states == {0: "COUNTED", 1: "COUNTED", 2: "ABANDONED", 3: "ABANDONED"}
        assert [update["client"] for update in entry["updates"]] == [0, 1]
        pixel, gradient = sorted(entry["incidents"], key=lambda incident: int(incident["client"]))
        assert (pixel["client"], pixel["kind"]) == (2, "non-finite-loss")
        assert (pixel["epoch"], pixel["loss"]) == (1, "nan")
        # 6 batches an epoch, one of them with the bad pixel.
        assert 1 <= pixel["step"] <= 6
        assert (gradient["client"], gradient["kind"]) == (3, "non-finite-gradient")
        assert gradient["step"] == 1
        assert gradient["tensor"] in names
        model = model_of(scene.folder / "server", entry["model_digest"])
        assert all(bool(torch.isfinite(tensor).all()) for tensor in model.values())
    for client in clients[2:]:
        assert client.count_lines("no update is sent") == 2


def test_the_built_in_sample_learns_digits_with_default_settings(scene: Scene) -> None:
    """Two clients that name no task take the server's, and two rounds beat guessing by far."""
    server = scene.server("--rounds", 2)
    clients = [scene.client(client_id, server.address) for client_id in (0, 1)]
    expect_clean_exits(server, *clients)
    history = scene.history()
    assert verdicts(history) == [
        (number, client, "COUNTED") for number in (1, 2) for client in (0, 1)
    ]
    assert history[-1]["evaluation"]["accuracy"] > 0.5
