"""Strategies in whole runs: a server's state survives kills, is kept with its models, verified."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from fedrounds.failpoints import VARIABLE, FailPoint
from tests.acceptance.federation import (
    NO_CLOCK,
    expect_clean_exits,
    incident_kinds,
    start_client,
    start_server,
    verdicts,
)
from tests.processes import Scene, fixed_port, wait_until

CLIENTS = (0, 1)
NUM_ROUNDS = 4
FLAGS = (*("--rounds", NUM_ROUNDS, "--min-clients", len(CLIENTS), "--require-all", "--seed", 5),)


def models_of(history: list[dict[str, Any]]) -> list[str]:
    """Return each round's model."""
    return [entry["model_digest"] for entry in history]


def state_files(folder: Path) -> set[str]:
    """Return the digests of the server states that are kept."""
    return {path.stem for path in (folder / "models").glob("*.server-state")}


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [("median+fedyogi", "server_lr=0.02,tau=0.01"), ("scaffold", f"num_clients={len(CLIENTS)}")],
)
def test_a_strategys_state_outlives_kills_and_is_verified(
    scene: Scene, strategy: str, parameters: str
) -> None:
    """Killed -9 in the middle the run ends in the same models; verify makes every state again.

    Server and a client are killed; under SCAFFOLD either has state that goes with the models. The
    second run also lets go what --keep-rounds says: states go with their models.
    """
    chosen = (*FLAGS, "--strategy", strategy, "--strategy-parameters", parameters)
    first = start_server(scene, *chosen, "--keep-updates", "all", state="whole")
    expect_clean_exits(
        first,
        *(
            start_client(scene, client_id, first.address, state=f"whole-{client_id}")
            for client_id in CLIENTS
        ),
    )
    expected = scene.history(state="whole")
    assert len(state_files(scene.folder / "whole")) == NUM_ROUNDS
    verified = scene.command("verify", "--state-dir", scene.folder / "whole")
    assert verified.returncode == 0, verified.stdout
    assert f"{NUM_ROUNDS} server states whole" in verified.stdout
    assert verified.stdout.endswith(f"{NUM_ROUNDS} of {NUM_ROUNDS} re-aggregated\n")

    flags = (*chosen, *NO_CLOCK, "--port", fixed_port(), "--keep-rounds", 1)
    server = start_server(scene, *flags)
    armed = {VARIABLE: f"{FailPoint.TRAINED}:halt:3"}
    clients = [
        start_client(scene, 0, server.address),
        start_client(scene, 1, server.address, **armed),
    ]
    # Round 3 is open, and stays so until somebody has killed both.
    wait_until(lambda: clients[1].is_halted, what="client 1 to be trained for round 3")
    for killed in (server, clients[1]):
        killed.signal(signal.SIGKILL)
        killed.wait()
    again = start_server(scene, *flags)
    expect_clean_exits(again, clients[0], start_client(scene, 1, again.address))
    history = scene.history()
    assert verdicts(history) == [
        (number, client, "COUNTED") for number in range(1, NUM_ROUNDS + 1) for client in CLIENTS
    ]
    assert models_of(history) == models_of(expected)
    kept = state_files(scene.folder / "server")
    assert kept < state_files(scene.folder / "whole")
    # Those that the last round began and ended with, and the best model's.
    assert 2 <= len(kept) <= 3
    assert scene.command("verify", "--state-dir", scene.folder / "server").returncode == 0


def test_a_strategy_that_a_round_could_starve_is_refused_at_the_start(scene: Scene) -> None:
    """In a sentence, before a run is begun."""
    server = start_server(scene, "--strategy", "krum", "--strategy-parameters", "f=2")
    assert server.wait() == 1
    assert "strategy krum needs at least 7 updates in a round, but 2 are enough" in server.lines[-1]
    assert not (scene.folder / "server" / "federation.sqlite").exists()


def test_a_rule_that_needs_a_number_of_updates_leaves_no_stragglers_out(scene: Scene) -> None:
    """Who is left out is drawn after the round's clients were."""
    flags = ("--strategy", "krum", "--min-clients", 9, "--stragglers", 0.5)
    server = start_server(scene, *flags, "--straggler-work", "none")
    assert server.wait() == 1
    assert "krum needs at least 5 updates in a round, and --straggler-work none" in server.lines[-1]


@pytest.mark.parametrize("name", ["int8", "top-k"])
def test_compressed_runs_repeat_through_a_kill(scene: Scene, name: str) -> None:
    """Rounding and residuals come from what is durable."""
    flags = (*FLAGS, "--compression", name)
    first = start_server(scene, *flags, state="whole")
    expect_clean_exits(
        first,
        *(
            start_client(scene, client_id, first.address, state=f"whole-{client_id}")
            for client_id in CLIENTS
        ),
    )
    server = start_server(scene, *flags, *NO_CLOCK)
    victim = start_client(scene, 1, server.address, FED_FAIL_POINT="trained:kill:3")
    other = start_client(scene, 0, server.address)
    assert victim.wait() == -signal.SIGKILL
    expect_clean_exits(server, other, start_client(scene, 1, server.address))
    history, expected = scene.history(), scene.history(state="whole")
    assert models_of(history) == models_of(expected)
    for entry in history:
        assert {update["encoding"] for update in entry["updates"]} == {name}
        assert entry["compression"]["ratio"] < 1
    assert incident_kinds(history) == []


def test_a_client_that_lost_its_residual_says_so(scene: Scene) -> None:
    """It goes on with an empty one, and the history has it."""
    flags = ("--rounds", 3, "--min-clients", 1, "--require-all", "--compression", "top-k")
    server = start_server(scene, *flags, *NO_CLOCK)
    client = start_client(scene, 0, server.address, FED_FAIL_POINT="order-pulled:kill:2")
    assert client.wait() == -signal.SIGKILL
    shutil.rmtree(scene.folder / "client-0" / "states")
    expect_clean_exits(server, start_client(scene, 0, server.address))
    history = scene.history()
    assert [[incident["kind"] for incident in entry["incidents"]] for entry in history] == [
        [],
        ["client-state-lost"],
        [],
    ]
    assert verdicts(history) == [(number, 0, "COUNTED") for number in (1, 2, 3)]
