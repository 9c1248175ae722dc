"""Looking at a run with `history` and `export` while it goes on."""

import signal
from pathlib import Path

from fedrounds.tensors.codec import decode_state, digest_bytes
from tests.acceptance.federation import expect_clean_exits, start_client, start_server
from tests.processes import Process, Scene, Server
from tests.tiny_task import tiny


def test_history_and_export_work_beside_a_running_server(scene: Scene) -> None:
    """They read what is durable so far, disturb nothing, and need no lock; so does `verify`."""
    server = start_server(scene, "--rounds", 2, "--min-clients", 1)
    client = start_client(scene, 0, server.address, TINY_STEP_S="0.4", TINY_TRACE="1")
    # 8 steps make a round of client 0; in the second it is made to stand still.
    client.wait_for_line("tiny-step 9$")
    client.signal(signal.SIGSTOP)
    done, collecting = scene.history()
    assert (done["phase"], collecting["phase"]) == ("DONE", "COLLECTING")
    assert collecting["model_digest"] is None
    assert collecting["base_digest"] == done["model_digest"]
    assert collecting["orders"][0]["state"] == "OPEN"
    exported = export(scene, scene.folder / "model.safetensors")
    assert digest_bytes(exported.read_bytes()) == done["model_digest"]
    tiny.build_model().load_state_dict(decode_state(exported.read_bytes()))
    too_early = scene.command(
        "export", "--state-dir", scene.folder / "server", "--round", "2", "--out", exported
    )
    assert (too_early.returncode, "done are: 1" in too_early.stderr) == (1, True)
    expect_the_table(scene)
    verified = scene.command("verify", "--state-dir", scene.folder / "server")
    assert verified.returncode == 0, verified.stdout
    assert "2 models whole" in verified.stdout
    assert "0 of 1 re-aggregated (1 not kept)" in verified.stdout
    client.signal(signal.SIGCONT)
    expect_still_at_work(server, client)


def export(scene: Scene, path: Path) -> Path:
    """Export the last model that is done."""
    done = scene.command("export", "--state-dir", scene.folder / "server", "--out", path)
    assert done.returncode == 0, done.stderr
    return path


def expect_the_table(scene: Scene) -> None:
    """Look at the history as a person does."""
    shown = scene.command("history", "--state-dir", scene.folder / "server")
    assert shown.returncode == 0, shown.stderr
    assert "done" in shown.stdout
    assert "collecting" in shown.stdout


def expect_still_at_work(server: Server, client: Process) -> None:
    """Check that the run goes on to its end."""
    assert server.is_running
    expect_clean_exits(server, client)
    assert server.count_lines("round-done") == 2


def test_looking_where_nothing_is_says_so(scene: Scene) -> None:
    """A wrong --state-dir is a sentence, and no new state-dir."""
    for words in (("history",), ("export", "--out", str(scene.folder / "x.safetensors"))):
        shown = scene.command(*words, "--state-dir", scene.folder / "nowhere")
        assert shown.returncode == 1
        assert "check --state-dir" in shown.stderr
        assert "Traceback" not in shown.stderr
    assert not (scene.folder / "nowhere").exists()
