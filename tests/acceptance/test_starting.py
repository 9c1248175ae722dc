"""Starting: in any order, and with any mistake; each mistake's error is a sentence."""

import os
import re
import shutil
import signal
from collections.abc import Iterator

import pytest

from fedrounds.files import locked_folder
from fedrounds.wire.pb import federation_pb2 as pb
from tests.acceptance.federation import (
    TINY,
    expect_clean_exits,
    start_client,
    start_server,
    verdicts,
)
from tests.integration.peer import Peer
from tests.processes import Process, Scene, Server, fixed_port
from tests.tiny_task import NUM_EXAMPLES_FILE


@pytest.fixture(scope="module")
def waiting(module_scene: Scene) -> Iterator[Server]:
    """Give a server that waits for more clients than will come, for all mistakes to be made at."""
    server = start_server(module_scene, "--min-clients", 9, "--rounds", 3)
    server.wait_for_line("waiting for clients")
    yield server
    server.signal(signal.SIGTERM)
    expect_clean_exits(server)


def expect_refusal(process: Process, *words: str, code: int = 1) -> None:
    """Wait for a process to end with an exit code and one sentence with these words in it."""
    assert process.wait() == code
    assert process.count_lines("Traceback") == 0
    sentence = process.lines[-1]
    assert re.match(r"(python -m )?fed(server|client): ", sentence), sentence
    missing = [word for word in words if word not in sentence]
    assert not missing, f"{missing} aren't in: {sentence}"


def test_a_port_in_use_is_an_error_with_what_to_do(waiting: Server, scene: Scene) -> None:
    """Two servers never share a port silently; gRPC's own words about it aren't shown."""
    port = waiting.address.rpartition(":")[2]
    second = start_server(scene, "--port", port)
    expect_refusal(second, f":{port}: the port is in use", "--port")
    assert len(second.lines) == 1


def test_a_run_that_never_began_takes_other_settings(waiting: Server, scene: Scene) -> None:
    """The port was taken; with another port and other settings the same folder will do."""
    port = waiting.address.rpartition(":")[2]
    assert start_server(scene, "--port", port, "--rounds", 7).wait() == 1
    server = start_server(scene, "--rounds", 1, "--min-clients", 1)
    expect_clean_exits(server, start_client(scene, 0, server.address))
    assert verdicts(scene.history()) == [(1, 0, "COUNTED")]


def test_the_error_of_a_lost_database_says_where_models_are(scene: Scene) -> None:
    """No new run begins over what an old run has left."""
    server = start_server(scene, "--rounds", 1, "--min-clients", 1)
    expect_clean_exits(server, start_client(scene, 0, server.address))
    for path in (scene.folder / "server").glob("federation.sqlite*"):
        path.unlink()
    again = start_server(scene, "--rounds", 1, "--min-clients", 1)
    expect_refusal(again, "federation.sqlite is gone", "2 of 2 global models", "--state-dir")
    assert not (scene.folder / "server" / "federation.sqlite").exists()


def test_a_state_dir_in_use_is_refused(waiting: Server, module_scene: Scene) -> None:
    """Two servers never write one state-dir; the second says which it is."""
    assert waiting.is_running
    second = start_server(module_scene, "--min-clients", 9, "--rounds", 3)
    expect_refusal(second, str(module_scene.folder / "server"), "in use by another process")


def test_a_client_id_in_use_is_refused(waiting: Server, module_scene: Scene) -> None:
    """One id is one client: the second process gets an error, and the first isn't disturbed."""
    holder = Peer(waiting.address, 4)
    client = start_client(module_scene, 4, waiting.address)
    expect_refusal(client, "client id 4 is in use by another process", "--id")
    assert holder.pull(wait_s=0).state == pb.WORK_STATE_WAIT
    holder.close()


def test_a_place_the_final_model_cant_go_to_begins_no_run(scene: Scene) -> None:
    """Told before the first round, not after the last."""
    folder = scene.folder / "folder"
    (folder / "model-best.safetensors").mkdir(parents=True)
    for path, words in (
        (folder, f"{folder} is a folder; name a file"),
        (folder / "model.safetensors", "model-best.safetensors is a folder"),
        (folder / "none" / "model.safetensors", "there is no such folder"),
        # Not even root can make a file there.
        ("/proc/model.safetensors", "nothing can be written in its folder"),
    ):
        expect_refusal(start_server(scene, "--export", path), "--export", words)
    assert not (scene.folder / "server").exists()


def test_a_clients_state_dir_in_use_is_refused(waiting: Server, module_scene: Scene) -> None:
    """One state-dir is one client process."""
    folder = module_scene.folder / "client-3"
    with locked_folder(folder):
        client = start_client(module_scene, 3, waiting.address)
        expect_refusal(client, str(folder), "in use by another process", "--state-dir")


def test_a_device_that_isnt_there_lists_those_that_are(
    waiting: Server, module_scene: Scene
) -> None:
    """Nobody trains on the CPU by mistake where a GPU was asked for."""
    client = start_client(module_scene, 5, waiting.address, "--device", "cuda:77")
    expect_refusal(client, "--device cuda:77 isn't there", "there are: cpu")


def test_a_task_nobody_knows_lists_the_tasks(scene: Scene) -> None:
    """A misspelt task ends the server before it listens."""
    server = scene.server("--task", "mnist-smaple")
    expect_refusal(server, "'mnist-smaple'", "mnist-sample", "fashion-mnist")
    assert server.stdout_lines == []


def test_a_task_without_a_model_begins_no_run(scene: Scene) -> None:
    """What is wrong with a task is an error before anything is written for it."""
    lines = (
        "from torch.nn.functional import cross_entropy",
        "from fedrounds.tasks.task import Task",
        "train = lambda request: None",
        "test = lambda data_root: None",
        "task = Task(name='own', build_model=dict, load_train=train, load_test=test,",
        "            loss=cross_entropy)",
    )
    (scene.folder / "modelless.py").write_text("\n".join(lines))
    server = scene.server("--task", "modelless:task", PYTHONPATH=str(scene.folder))
    expect_refusal(server, "'own': build_model returned a dict, not a torch.nn.Module")
    assert not (scene.folder / "server").exists()


def test_a_client_whose_own_task_is_broken_waits_for_no_server(scene: Scene) -> None:
    """It says so at once, though nobody answers at the address."""
    (scene.folder / "broken.py").write_text("raise RuntimeError('boom')\n")
    client = scene.client(0, "localhost:1", "--task", "broken:task", PYTHONPATH=str(scene.folder))
    expect_refusal(client, "importing broken raised RuntimeError: boom (broken.py, line 1)")


def test_a_client_of_another_task_ends_with_both_names(
    waiting: Server, module_scene: Scene
) -> None:
    """The error of a client that requires another task names the run's."""
    client = module_scene.client(6, waiting.address, "--task", "mnist-sample")
    expect_refusal(client, f"'{TINY}'", "'mnist-sample'")


def test_a_client_never_runs_code_that_only_the_server_names(
    waiting: Server, module_scene: Scene
) -> None:
    """A task that is somebody's own code needs the word of the person at the client."""
    client = module_scene.client(7, waiting.address)
    expect_refusal(client, f"if you trust it and have it here, start with --task {TINY}")


def test_an_id_beyond_the_partitions_is_refused(waiting: Server, module_scene: Scene) -> None:
    """A client whose share of the data doesn't exist learns how many shares there are."""
    client = start_client(module_scene, 10, waiting.address)
    expect_refusal(client, "partition 10 of 10 doesn't exist")


def test_wrong_flags_end_with_code_2_and_a_sentence(scene: Scene) -> None:
    """An error that needs neither server nor torch comes at once, with the nearest right name."""
    expect_refusal(scene.server("--round", 3), "round", "--rounds", code=2)
    expect_refusal(scene.server("--lr", "-1"), "--lr", "-1", code=2)
    expect_refusal(scene.client(1, "localhost:1", "--sorce", "local"), "--source", code=2)


def test_other_settings_for_an_unfinished_run_are_refused_by_name(scene: Scene) -> None:
    """A run goes on with its own settings or not at all; what differs is listed, old and new."""
    first = start_server(scene, "--rounds", 3, "--lr", 0.1, "--min-clients", 1)
    first.wait_for_line("fedserver listening on")
    peer = Peer(first.address, 0)
    peer.pull_order()
    peer.close()
    first.signal(signal.SIGTERM)
    expect_clean_exits(first)
    second = start_server(scene, "--rounds", 4, "--lr", 0.2)
    expect_refusal(
        second, "rounds was 3, is now 4", "lr was 0.1, is now 0.2", "another --state-dir"
    )
    assert not any("epochs" in line for line in second.lines)


def test_a_client_that_is_early_waits_and_says_so_once(scene: Scene) -> None:
    """Clients may be started first; they find the server when it comes, and say that too."""
    port = fixed_port()
    client = start_client(scene, 0, f"127.0.0.1:{port}")
    client.wait_for_line(f"no answer from 127.0.0.1:{port}")
    server = start_server(scene, "--port", port, "--rounds", 1, "--min-clients", 1)
    expect_clean_exits(server, client)
    assert client.count_lines("no answer from") == 1
    assert client.count_lines(f"{port} answers$") == 1
    assert verdicts(scene.history()) == [(1, 0, "COUNTED")]


def test_a_client_that_stays_takes_part_in_the_next_run(scene: Scene) -> None:
    """After a finished run the same command begins the next; the client reads its data anew."""
    port = fixed_port()
    flags = ("--port", port, "--rounds", 1, "--min-clients", 1)
    file = scene.folder / NUM_EXAMPLES_FILE
    file.write_text("16")
    first = start_server(scene, *flags)
    local = ("--source", "local", "--data-root", scene.folder)
    client = start_client(scene, 0, first.address, "--stay", *local)
    expect_clean_exits(first)
    expect_clean_exits(start_server(scene, *flags))
    file.write_text("24")
    expect_clean_exits(start_server(scene, *flags))
    client.signal(signal.SIGTERM)
    expect_clean_exits(client)
    assert client.count_lines("update stored") == 3
    runs = [scene.history("--run", number) for number in ("1", "2", "3")]
    assert [verdicts(history) for history in runs] == [[(1, 0, "COUNTED")]] * 3
    assert [history[0]["updates"][0]["num_examples"] for history in runs] == [16, 16, 24]
    # The same seed, task and data: the same model, and another run all the same.
    assert runs[0][0]["model_digest"] == runs[1][0]["model_digest"]
    assert runs[0][0]["orders"][0]["order_id"] != runs[1][0]["orders"][0]["order_id"]


def test_both_processes_with_copies_of_a_state_dir_learn_of_it(scene: Scene) -> None:
    """Both clients end with a sentence; the client that is started again goes on."""
    server = start_server(scene, "--min-clients", 2, "--rounds", 1, "--lease", 10)
    clients = [start_client(scene, 0, server.address, state="original")]
    clients[0].wait_for_line("waiting for clients: 1 of the 2 that a round needs are here")
    shutil.copytree(scene.folder / "original", scene.folder / "copy")
    clients.append(start_client(scene, 0, server.address, state="copy"))
    for client in clients:
        expect_refusal(client, "another process uses a copy of the state-dir of client id 0")
    assert server.count_lines("WARNING state-dir-copied client=0") == 1
    again = start_client(scene, 0, server.address, state="original")
    expect_clean_exits(server, again, start_client(scene, 1, server.address))
    assert verdicts(scene.history()) == [(1, 0, "COUNTED"), (1, 1, "COUNTED")]


def test_a_run_needs_no_temporary_folder(scene: Scene) -> None:
    """Nor a home: a read-only root file system has none that can be written to."""
    hidden = "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/proc']\n"
    scene.folder.joinpath("sitecustomize.py").write_text(hidden)
    kept = {"PYTHONPATH": f"{scene.folder}:{os.environ.get('PYTHONPATH', '')}", "HOME": "/proc"}
    server = start_server(scene, "--rounds", 1, "--min-clients", 1, **kept)
    client = start_client(scene, 0, server.address, **kept)
    expect_clean_exits(server, client)
    assert verdicts(scene.history()) == [(1, 0, "COUNTED")]
