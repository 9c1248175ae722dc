"""Clients whose trainings all fail for one reason, with their doctors and the server's answer."""

from tests.acceptance.conftest import CLIENTS
from tests.acceptance.federation import expect_clean_exits, start_client, start_server
from tests.processes import Scene


def test_a_rate_that_is_too_high_for_all_is_lowered_for_all(scene: Scene) -> None:
    """Each client cures its own training; the server lowers the next round's rate."""
    server = start_server(
        scene, *("--rounds", 3, "--min-clients", len(CLIENTS), "--require-all", "--lr", 300)
    )
    clients = [start_client(scene, one, server.address) for one in CLIENTS]
    server.wait_for_line("training-diagnosed round=1 .*learning-rate at step .* training went on")
    server.wait_for_line("cause-shared round=1 cause=learning-rate")
    expect_clean_exits(server, *clients)

    first, second, *_ = history = scene.history()
    assert {one["phase"] for one in history} == {"DONE"}
    assert first["adjustments"] == {}
    (shared,) = (one for one in first["incidents"] if one["kind"] == "cause-shared")
    diagnosed = {
        one["client"]
        for one in first["incidents"]
        if one["kind"] == "training-diagnosed" and one["diagnosis"]["cause"] == "learning-rate"
    }
    assert set(shared["clients"]) == diagnosed
    assert len(diagnosed) >= 2
    assert 0.1 <= second["adjustments"]["lr_factor"] <= 0.5
    # What the clients keep to themselves unless told otherwise.
    assert all(
        one["diagnosis"]["samples"] == []
        for entry in history
        for one in entry["incidents"]
        if "diagnosis" in one
    )
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert verified.returncode == 0, verified.stdout
    shown = scene.command("show", "--state-dir", scene.folder / "server", "--round", "2").stdout
    assert "changed for this attempt: rate times" in shown
