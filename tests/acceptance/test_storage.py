"""The server's own health: what the disk holds, how much room it has, and for how long."""

import os
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from fedrounds.failpoints import VARIABLE, FailPoint
from fedrounds.tensors.codec import digest_bytes, digest_file
from fedrounds.wire.pb import federation_pb2 as pb
from tests.acceptance.federation import (
    BIG,
    NO_CLOCK,
    expect_clean_exits,
    incident_kinds,
    start_client,
    start_server,
    verdicts,
)
from tests.acceptance.test_mistakes import expect_sentence
from tests.integration.peer import Peer
from tests.processes import Scene, Server, fixed_port, wait_until

GIB = 1 << 30


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def stop_amid_a_round(scene: Scene, *flags: str | int) -> tuple[Server, int]:
    """Kill a server that holds the update of client 0 and waits for client 1's."""
    port = fixed_port()
    server = start_server(scene, "--port", port, *flags)
    start_client(scene, 0, server.address)
    start_client(scene, 1, server.address, TINY_STEP_S="0.2")
    server.wait_for_line("update-stored round=1 client=0 ")
    server.kill()
    return server, port


def models(scene: Scene) -> dict[str, Path]:
    """Return the server's global models by digest."""
    folder = scene.folder / "server" / "models"
    return {path.stem: path for path in folder.glob("*.safetensors")}


def test_a_damaged_update_is_named_and_the_round_can_be_asked_for_anew(scene: Scene) -> None:
    """An acknowledged update whose bytes changed: no start, nothing deleted, and a way on."""
    flags = ("--rounds", 2, "--min-clients", 2)
    _, port = stop_amid_a_round(scene, *flags)
    (spooled,) = (scene.folder / "server" / "spool").glob("*-c0-*")
    flip_a_bit(spooled)
    damaged = spooled.read_bytes()
    refused = start_server(scene, "--port", port, *flags)
    expect_sentence(refused, "client 0", str(spooled), "--give-up-damaged", "Nothing was deleted")
    assert spooled.read_bytes() == damaged

    again = start_server(scene, "--port", port, *flags, "--give-up-damaged")
    expect_clean_exits(again, *scene.processes[1:3])
    history = scene.history()
    assert [(entry["round"], entry["attempt"], entry["phase"]) for entry in history] == [
        (1, 1, "FAILED"),
        (1, 2, "DONE"),
        (2, 1, "DONE"),
    ]
    (failed,) = (
        incident for incident in history[0]["incidents"] if incident["kind"] == "round-failed"
    )
    assert "client 0" in failed["reason"]
    assert [state for number, _, state in verdicts(history) if number == 1] == [
        *["ABANDONED"] * 2,
        *["COUNTED"] * 2,
    ]


def test_a_damaged_database_is_named_with_what_can_be_saved(scene: Scene) -> None:
    """Pages overwritten: no start, no change, and the global models that are whole are counted."""
    flags = ("--rounds", 3, "--min-clients", 2)
    _, port = stop_amid_a_round(scene, *flags)
    database = scene.folder / "server" / "federation.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(database.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    database.write_bytes(content)
    refused = start_server(scene, "--port", port, *flags)
    (digest,) = models(scene)
    expect_sentence(refused, str(database), "1 of 1 global models", f"{digest}.safetensors")
    assert database.read_bytes() == content
    assert digest_file(models(scene)[digest]) == digest


def test_a_damaged_model_is_named(scene: Scene) -> None:
    """The base of the open round isn't what its name says: no start."""
    flags = ("--rounds", 3, "--min-clients", 2)
    _, port = stop_amid_a_round(scene, *flags)
    (path,) = models(scene).values()
    flip_a_bit(path)
    expect_sentence(start_server(scene, "--port", port, *flags), str(path), "other bytes")


def test_no_round_opens_without_room_and_the_run_goes_on_when_there_is(scene: Scene) -> None:
    """Less than --min-free-bytes free: an incident, and waiting; the rest by itself."""
    scene.folder.joinpath("server").mkdir()
    filler = scene.folder / "filler"
    free_bytes = shutil.disk_usage(scene.folder).free
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * GIB)
    server = start_server(
        *(scene, "--rounds", 2, "--min-clients", 1),
        *("--min-free-bytes", free_bytes - 2 * GIB),
    )
    client = start_client(scene, 0, server.address)
    server.wait_for_line("disk-low")
    assert scene.history() == []
    filler.unlink()
    server.wait_for_line("disk-recovered")
    expect_clean_exits(server, client)
    assert verdicts(scene.history()) == [(1, 0, "COUNTED"), (2, 0, "COUNTED")]


def done_rounds(scene: Scene) -> list[dict[str, Any]]:
    """Return the history's rounds that are done."""
    return [entry for entry in scene.history() if entry["phase"] == "DONE"]


def test_only_so_many_models_and_updates_are_kept(scene: Scene) -> None:
    """What the last two rounds began and ended with, the best model, the last round's updates."""
    server = start_server(
        *(scene, "--rounds", 6, "--min-clients", 2, "--lr", 0.5),
        *("--keep-rounds", 2, "--keep-updates", 1),
    )
    expect_clean_exits(
        server, *(start_client(scene, client_id, server.address) for client_id in (0, 1))
    )
    history = done_rounds(scene)
    losses = [entry["evaluation"]["loss"] for entry in history]
    best = history[losses.index(min(losses))]["model_digest"]
    last_two = {entry[key] for entry in history[-2:] for key in ("base_digest", "model_digest")}
    assert models(scene).keys() == last_two | {best}
    spooled = (scene.folder / "server" / "spool").iterdir()
    assert {path.name.rpartition(".")[2] for path in spooled} == {
        update["digest"] for update in history[-1]["updates"]
    }
    gone = scene.command(
        *("export", "--state-dir", scene.folder / "server", "--round", "1"),
        *("--out", scene.folder / "one.safetensors"),
    )
    assert (gone.returncode == 0) == (history[0]["model_digest"] == best)
    assert gone.returncode == 0 or "isn't kept any more" in gone.stderr


def test_a_model_that_somebody_downloads_is_kept_until_it_is_there(scene: Scene) -> None:
    """Rounds after --keep-rounds would have let it go; it goes when nobody needs it any more."""
    server = start_server(
        *(scene, "--rounds", 6, "--min-clients", 1, "--keep-rounds", 1),
        *("--require-all", *NO_CLOCK),
        task=BIG,
    )
    reader = Peer(server.address, 1, num_examples=0)
    # It says nothing of its data: no round asks it.
    reader.session_id = reader.register().session_id
    wait_until(lambda: len(models(scene)) == 1, what="the model that the run begins with")
    (first,) = models(scene)
    parts = reader.download_parts(first)
    begun = next(parts)
    armed = {VARIABLE: f"{FailPoint.TRAINED}:halt:5"}
    client = start_client(scene, 0, server.address, task=BIG, **armed)
    wait_until(lambda: client.is_halted, what="the client to be trained for round 5")
    assert first in models(scene)
    assert digest_bytes(begun + b"".join(parts)) == first
    client.signal(signal.SIGCONT)
    while reader.pull().state != pb.WORK_STATE_FINISHED:
        continue
    reader.close()
    expect_clean_exits(server, client)
    assert first not in models(scene)


def test_a_round_that_asks_more_than_it_needs_leaves_the_slowest_behind(scene: Scene) -> None:
    """Three are asked, two count: the third gets ABANDON, is late, and is asked again."""
    server = start_server(
        *(scene, "--rounds", 3, "--min-clients", 3, "--clients-per-round", 2),
        *("--over-select", 1.5),
    )
    clients = [start_client(scene, client_id, server.address) for client_id in (0, 1)]
    clients.append(start_client(scene, 2, server.address, TINY_STEP_S="0.2"))
    expect_clean_exits(server, *clients)
    history = scene.history()
    assert [len(entry["cohort"]) for entry in history] == [3, 3, 3]
    for entry in history:
        states = {order["client"]: order["state"] for order in entry["orders"]}
        assert states == {0: "COUNTED", 1: "COUNTED", 2: "LATE"}
    assert "client-stalled" not in incident_kinds(history)
    wait_until(lambda: clients[2].count_lines("wants no update any more") > 0, what="its word")
