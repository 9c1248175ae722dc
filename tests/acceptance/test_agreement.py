"""Clients whose trainings all fail for one reason, with their doctors and the server's answer."""

import pytest

from tests.acceptance.conftest import CLIENTS
from tests.acceptance.federation import (
    expect_clean_exits,
    incident_kinds,
    start_client,
    start_server,
    verdicts,
)
from tests.processes import Scene


def test_a_rate_that_is_too_high_for_all_is_lowered_for_all(scene: Scene) -> None:
    """Each client cures its own training; the server lowers the next round's rate."""
    server = start_server(
        scene, *("--rounds", 3, "--min-clients", len(CLIENTS), "--require-all", "--lr", 300)
    )
    clients = [start_client(scene, client_id, server.address) for client_id in CLIENTS]
    server.wait_for_line("training-diagnosed round=1 .*learning-rate at step .* training went on")
    server.wait_for_line("cause-shared round=1 cause=learning-rate")
    expect_clean_exits(server, *clients)

    first, second, *_ = history = scene.history()
    assert {entry["phase"] for entry in history} == {"DONE"}
    assert first["adjustments"] == {}
    (shared,) = (incident for incident in first["incidents"] if incident["kind"] == "cause-shared")
    diagnosed = {
        incident["client"]
        for incident in first["incidents"]
        if incident["kind"] == "training-diagnosed"
        and incident["diagnosis"]["cause"] == "learning-rate"
    }
    assert set(shared["clients"]) == diagnosed
    assert len(diagnosed) >= 2
    assert 0.1 <= second["adjustments"]["lr_factor"] <= 0.5
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert verified.returncode == 0, verified.stdout
    shown = scene.command("show", "--state-dir", scene.folder / "server", "--round", "2").stdout
    assert "changed for this attempt: rate times" in shown


@pytest.mark.parametrize("flags", [(), ("--report-samples",)], ids=["by default", "if told"])
def test_which_samples_are_bad_leaves_the_client_only_if_allowed(
    scene: Scene, flags: tuple[str, ...]
) -> None:
    """Neither their numbers nor where in its batch the first bad number is."""
    server = start_server(scene, "--rounds", 1, "--min-clients", 1)
    client = start_client(scene, 0, server.address, *flags, TINY_BAD="pixel")
    expect_clean_exits(server, client)
    (incident,) = scene.history()[0]["incidents"]
    diagnosis = incident["diagnosis"]
    assert (diagnosis["cause"], diagnosis["num_samples"]) == ("bad-data", 1)
    assert [sample["index"] for sample in diagnosis["samples"]] == ([3] if flags else [])
    assert bool(diagnosis["origin"]["first_index"]) == bool(flags)


def test_a_client_of_whose_data_nothing_is_left_sends_nothing_and_stays(scene: Scene) -> None:
    """Its only batch is left out in every epoch: no loss of nan, no suspension, no traceback."""
    flags = ("--rounds", 2, "--min-clients", 2, "--min-updates", 1, "--batch-size", 64)
    server = start_server(scene, *flags)
    good = start_client(scene, 0, server.address)
    bad = start_client(
        scene, 1, server.address, "--doctor", "skip", "--log-steps", 1, TINY_BAD="pixel"
    )
    expect_clean_exits(server, good, bad)
    history = scene.history()
    assert [(number, state) for number, client, state in verdicts(history) if client == 0] == [
        (1, "COUNTED"),
        (2, "COUNTED"),
    ]
    assert {update["client"] for entry in history for update in entry["updates"]} == {0}
    assert "update-refused" not in incident_kinds(history)
    assert bad.count_lines("every batch was left out") >= 1
