"""What goes wrong around a run: each error is a sentence, and nothing is lost by it."""

import resource
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from fedrounds.failpoints import VARIABLE, FailPoint
from fedserver.store.schema import REVISION
from tests.acceptance.federation import (
    BIG,
    expect_clean_exits,
    incident_kinds,
    start_client,
    start_server,
    verdicts,
)
from tests.own_code_tasks import SECRET
from tests.processes import Process, Scene, Server, wait_until

MIB = 1 << 20


@pytest.fixture
def empty_text_server(scene: Scene) -> Iterator[Server]:
    """Give a server of the text task, which has nothing to evaluate on, waiting for clients."""
    server = scene.server("--task", "text", "--min-clients", 9)
    server.wait_for_line("waiting for clients")
    yield server
    server.signal(signal.SIGTERM)
    expect_clean_exits(server)


def expect_sentence(process: Process, *words: str) -> None:
    """Wait for a process to fail with one sentence with these words in it."""
    assert process.wait() == 1
    assert process.count_lines("Traceback") == 0
    missing = [word for word in words if word not in process.lines[-1]]
    assert not missing, f"{missing} aren't in: {process.lines[-1]}"


def test_a_loss_that_the_server_does_not_admit_is_no_error(scene: Scene) -> None:
    """It isn't reported; the update counts, and the client goes on."""
    server = start_server(
        scene, "--min-clients", 1, "--rounds", 2, task="tests.own_code_tasks:huge"
    )
    client = start_client(
        scene, 0, server.address, "--doctor", "off", task="tests.own_code_tasks:huge"
    )
    assert client.wait() == 0
    assert client.count_lines("loss too large to report") == 2
    assert server.wait() == 0


def test_a_task_that_ends_the_process_in_training_has_failed(scene: Scene) -> None:
    """The server hears so at once, as of any other error of the task's own code."""
    task = "tests.own_code_tasks:exits"
    server = start_server(scene, "--min-clients", 1, "--rounds", 1, task=task)
    client = start_client(scene, 0, server.address, task=task)
    assert client.wait() == 1
    assert "training in round 1 failed with SystemExit: " in client.lines[-1]
    server.wait_for_line("client-left round=1 client=0 reason=task-failed")
    server.kill()
    assert server.count_lines(SECRET) == 0


def test_an_error_of_the_tasks_own_code_is_shown_where_it_was_raised(scene: Scene) -> None:
    """Whole, on the client's own screen; the server hears that training failed, nothing else."""
    task = "tests.own_code_tasks:later"
    server = start_server(scene, "--min-clients", 1, "--rounds", 1, task=task)
    client = start_client(scene, 0, server.address, task=task)
    assert client.wait() == 1
    text = "\n".join(client.lines)
    assert "own_code_tasks.py" in text
    assert client.lines[-1].startswith("fedclient: task 'tiny': training in round 1 failed with ")
    assert client.count_lines(SECRET) == 2
    server.wait_for_line("training-failed")
    server.kill()
    assert server.count_lines(SECRET) == 0
    assert SECRET not in str(scene.history())


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
@pytest.mark.parametrize("who", ["server", "client"])
def test_a_full_disk_is_waited_out(scene: Scene, who: str) -> None:
    """No file may grow beyond 4 MiB for a while, then it may: the round ends as if nothing was."""
    server = start_server(
        scene, *("--rounds", 2, "--min-clients", 1, "--stall-after", 600), task=BIG
    )
    client = start_client(scene, 0, server.address, task=BIG, TINY_STEP_S="0.2", TINY_TRACE="1")
    # In the first step the global model is downloaded and nothing of the update is written yet.
    client.wait_for_line("tiny-step 1$")
    full = server if who == "server" else client
    unlimited = resource.prlimit(full.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (4 * MIB, unlimited[1]))
    client.wait_for_line(
        "the server is out of disk space" if who == "server" else "no room to write in"
    )
    assert server.is_running
    assert client.is_running
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, unlimited)
    expect_clean_exits(server, client)
    assert verdicts(scene.history()) == [(1, 0, "COUNTED"), (2, 0, "COUNTED")]
    assert incident_kinds(scene.history()) == (["disk-full"] if who == "server" else [])


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
def test_a_full_disk_during_a_download_is_reported_as_the_clients_own(scene: Scene) -> None:
    """Not as a server that doesn't answer; the download goes on when there is room."""
    server = start_server(scene, "--rounds", 1, "--min-clients", 1, task=BIG)
    armed = {VARIABLE: f"{FailPoint.ORDER_PULLED}:halt"}
    client = start_client(scene, 0, server.address, task=BIG, **armed)
    wait_until(lambda: client.is_halted, what="the client to have its order")
    unlimited = resource.prlimit(client.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (4 * MIB, unlimited[1]))
    client.signal(signal.SIGCONT)
    client.wait_for_line("no room to write in .*; trying again until there is room")
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, unlimited)
    client.wait_for_line("there is room again")
    expect_clean_exits(server, client)
    assert client.count_lines("no answer|answers again") == 0
    assert verdicts(scene.history()) == [(1, 0, "COUNTED")]


def test_the_error_of_a_client_with_another_model_says_where_they_differ(scene: Scene) -> None:
    """One name, two versions of a task: the client ends, and with the right one takes part."""
    server = start_server(scene, "--rounds", 1, "--min-clients", 1)
    other = start_client(scene, 0, server.address, TINY_WIDTH="17")
    expect_sentence(other, "the server's model isn't that of task 'tiny'", "'0.bias'", "[17]")
    assert server.is_running
    expect_clean_exits(start_client(scene, 0, server.address), server)


def test_a_state_dir_that_cant_be_made_is_refused(scene: Scene) -> None:
    """A file in the folder's place, on either side."""
    (scene.folder / "file").write_text("not a folder")
    server = start_server(scene, state="file")
    expect_sentence(server, str(scene.folder / "file"), "can't be used", "--state-dir")
    client = start_client(scene, 0, "localhost:1", state="file")
    expect_sentence(client, str(scene.folder / "file"), "can't be used", "--state-dir")


def test_a_state_dir_of_a_newer_version_is_left_alone(scene: Scene) -> None:
    """Neither serving nor looking touches what a newer version wrote."""
    first = start_server(scene, "--rounds", 3)
    first.wait_for_line("waiting for clients")
    first.signal(signal.SIGTERM)
    expect_clean_exits(first)
    with closing(sqlite3.connect(scene.folder / "server" / "federation.sqlite")) as connection:
        connection.execute(
            "UPDATE alembic_version SET version_num = ?", (f"{int(REVISION) + 1:04}",)
        )
        connection.commit()
    expect_sentence(start_server(scene, "--rounds", 3), "newer version", "update the software")
    shown = scene.command("history", "--state-dir", scene.folder / "server")
    assert (shown.returncode, shown.stdout) == (1, "")
    assert "update the software" in shown.stderr


def test_data_that_isnt_there_is_asked_for_by_its_flag(
    empty_text_server: Server, scene: Scene
) -> None:
    """A client without data never takes part; the server hears that it has left, not why."""
    without = scene.client(0, empty_text_server.address, "--source", "local")
    expect_sentence(without, "task 'text' needs --data-root")
    (scene.folder / "nothing").mkdir()
    empty = scene.client(
        1, empty_text_server.address, "--source", "local", "--data-root", scene.folder / "nothing"
    )
    expect_sentence(empty, str(scene.folder / "nothing"))
    for client_id in (0, 1):
        empty_text_server.wait_for_line(f"client-left client={client_id} reason=gave-up")
    assert empty_text_server.is_running
