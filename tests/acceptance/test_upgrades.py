"""A run that an earlier version began goes on with today's, on both sides."""

from tests.acceptance.federation import expect_clean_exits, start_client, start_server, verdicts
from tests.earlier_state import FINISHED, SERVER_FLAGS, UNFINISHED, unpack_earlier_state
from tests.processes import Scene


def test_a_run_that_an_earlier_version_began_goes_on(scene: Scene) -> None:
    """The same commands as before: nothing is trained again, and both runs can be verified."""
    unpack_earlier_state(scene.folder)
    before = scene.history("--run", str(UNFINISHED))
    (stored,) = before[-1]["updates"]
    assert (before[-1]["phase"], stored["client"], stored["verdict"]) == ("COLLECTING", 0, "STORED")
    finished = scene.history("--run", str(FINISHED))

    server = start_server(scene, *SERVER_FLAGS)
    server.wait_for_line("upgraded .*federation.sqlite; a copy of it as it was is in ")
    clients = [start_client(scene, client_id, server.address) for client_id in (0, 1)]
    expect_clean_exits(server, *clients)

    after = scene.history()
    assert verdicts(after) == [
        (number, client_id, "COUNTED") for number in (1, 2, 3) for client_id in (0, 1)
    ]
    assert [entry["model_digest"] for entry in after] == [
        entry["model_digest"] for entry in finished
    ]
    assert after[1]["updates"][0]["received_at"] == stored["received_at"]
    assert scene.history("--run", str(FINISHED)) == finished
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert (verified.returncode, verified.stderr) == (0, "")
    assert "6 of 6 re-aggregated" in verified.stdout


def test_an_earlier_state_dir_can_be_verified_before_its_upgrade(scene: Scene) -> None:
    """Looking needs no server, and no upgrade in place."""
    unpack_earlier_state(scene.folder)
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert (verified.returncode, verified.stderr) == (0, "")
    assert not list((scene.folder / "server").glob("*schema*"))
