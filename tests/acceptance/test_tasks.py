"""Tasks with real processes: a user's own, texts, tables, and the options of a training."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from examples.own_task.waves import draw_waves
from tests.acceptance.federation import expect_clean_exits
from tests.processes import ROOT, Scene

WAVES = "examples.own_task.waves:waves"
FLOWERS = "tabular,label=species,features=length+width,classes=setosa+virginica"


def write_flowers(folder: Path, *, num: int, first: int = 0) -> Path:
    """Write a table in which the longer half are virginica, and return its folder."""
    folder.mkdir()
    rows = []
    for k in range(first, first + num):
        is_long = k % 2
        rows.append(f"{2 * is_long + k % 7 / 7:.4f},{k % 5},{('setosa', 'virginica')[is_long]}")
    (folder / "flowers.csv").write_text("\n".join(["length,width,species", *rows]) + "\n")
    return folder


def test_the_own_task_of_the_examples_runs_end_to_end(scene: Scene) -> None:
    """With the README's commands: two clients that draw waves, and one with its own recordings."""
    waves, kinds = draw_waves(seed=100, num=96).tensors
    own = scene.folder / "recordings"
    own.mkdir()
    save_file({"waves": waves, "kinds": kinds}, own / "waves.safetensors")
    server = scene.server(
        *("--task", WAVES, "--rounds", 5, "--lr", 0.05, "--min-clients", 3, "--require-all")
    )
    clients = [scene.client(client_id, server.address, "--task", WAVES) for client_id in (0, 1)]
    local = ("--source", "local", "--data-root", own)
    clients.append(scene.client(2, server.address, "--task", WAVES, *local))
    expect_clean_exits(server, *clients)
    history = scene.history()
    assert [update["num_examples"] for update in history[-1]["updates"]] == [300, 300, 96]
    # Three kinds: guessing is right one time in three.
    assert history[-1]["evaluation"]["accuracy"] > 0.75


def test_the_own_task_is_short() -> None:
    lines = (ROOT / "examples/own_task/waves.py").read_text().splitlines()
    assert len(lines) < 40


def test_clients_learn_from_their_own_tables_and_the_error_of_a_bad_table_says_where(
    scene: Scene,
) -> None:
    """The client with a bad cell stops at its start; its sentence stays with it; two go on."""
    held_out = write_flowers(scene.folder / "held-out", num=50, first=1000)
    server = scene.server(
        *("--task", FLOWERS, "--data-root", held_out, "--rounds", 4, "--batch-size", 8),
        *("--evaluate-on-clients", "--holdout", 0.25),
    )
    bad = write_flowers(scene.folder / "bad", num=20)
    with (bad / "flowers.csv").open("a") as file:
        file.write("SECRET,1,setosa\n")
    refused = scene.client(7, server.address, "--source", "local", "--data-root", bad)
    assert refused.wait() == 1
    assert refused.count_lines(r"flowers.csv, line 22, column 'length': 'SECRET' is no finite") == 1
    assert refused.count_lines("^Traceback") == 0

    clients = []
    for client_id in (0, 1):
        own = write_flowers(
            scene.folder / f"own-{client_id}", num=40 + client_id, first=100 * client_id
        )
        clients.append(
            scene.client(client_id, server.address, "--source", "local", "--data-root", own)
        )
    expect_clean_exits(server, *clients)
    history = scene.history()
    # A quarter, rounded to 10 examples, is held out.
    assert [update["num_examples"] for update in history[-1]["updates"]] == [30, 31]
    assert history[-1]["evaluation"]["accuracy"] > 0.9
    expect_each_class_shown(scene, history[-1])
    expect_each_client_shown(scene, history[-1])
    kept = b"".join(
        path.read_bytes() for path in (scene.folder / "server").rglob("*") if path.is_file()
    )
    assert server.count_lines("SECRET") == 0
    assert b"SECRET" not in kept


def expect_each_class_shown(scene: Scene, last: dict[str, Any]) -> None:
    """Look at how well each class is known, as a person does and as a program does."""
    confusion, accuracies = last["evaluation"]["confusion"], last["evaluation"]["class_accuracy"]
    total = sum(map(sum, confusion))
    right = sum(row[number] for number, row in enumerate(confusion))
    assert right / total == pytest.approx(last["evaluation"]["accuracy"])
    picture = scene.folder / "confusion.png"
    shown = scene.command("confusion", "--state-dir", scene.folder / "server", "--out", picture)
    assert shown.returncode == 0, shown.stderr
    assert all(f"{accuracy:.4f}" in shown.stdout for accuracy in accuracies)
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = scene.command("confusion", "--state-dir", scene.folder / "server", "--round", "99")
    assert (refused.returncode, "no confusion matrix of round 99" in refused.stderr) == (1, True)
    assert not refused.stdout


def expect_each_client_shown(scene: Scene, last: dict[str, Any]) -> None:
    """Look at how good the model of the round before is on each client's held-out rows."""
    accuracies = [update["metrics"]["global_accuracy"] for update in last["updates"]]
    assert last["client_evaluation"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert last["client_evaluation"]["num_examples"] == 20
    picture = scene.folder / "clients.png"
    shown = scene.command("clients", "--state-dir", scene.folder / "server", "--out", picture)
    assert shown.returncode == 0, shown.stderr
    assert all(f"{accuracy:.4f}" in shown.stdout for accuracy in accuracies)
    assert "on 25% of each one's examples, held out" in " ".join(shown.stdout.split())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_clients_learn_to_write_from_their_own_texts(scene: Scene) -> None:
    """A text that repeats is soon known: far better than the share of its commonest letter."""
    verse = "the quick brown fox jumps over the lazy dog\n"
    for name, times in (("held-out", 40), ("own-0", 150), ("own-1", 150)):
        (scene.folder / name).mkdir()
        (scene.folder / name / "verse.txt").write_text(verse * times)
    server = scene.server(
        *("--task", "text", "--data-root", scene.folder / "held-out", "--rounds", 3),
        *("--optimizer", "adam", "--lr", 0.01, "--clip-norm", 1, "--batch-size", 8),
    )
    clients = [
        scene.client(
            client_id,
            server.address,
            "--source",
            "local",
            "--data-root",
            scene.folder / f"own-{client_id}",
        )
        for client_id in (0, 1)
    ]
    expect_clean_exits(server, *clients)
    last = scene.history()[-1]["evaluation"]
    assert last["accuracy"] > 0.8
    assert last["accuracy"] <= last["top5_accuracy"] <= 1


def test_schedule_initialisation_and_augmentation_reach_the_clients(scene: Scene) -> None:
    """100 examples in batches of 25 make 4 steps an epoch, so 8 in two rounds of one epoch.

    Cosine over the run: step k of 8 trains at lr (1 + cos(pi k / 8)) / 2.
    """
    server = scene.server(
        *("--rounds", 2, "--epochs", 1, "--batch-size", 25, "--num-partitions", 100),
        *("--lr", 0.04, "--schedule", "cosine", "--augment", "shift", "--init", "kaiming_normal"),
    )
    clients = [scene.client(client_id, server.address, "--log-steps", 2) for client_id in (0, 1)]
    expect_clean_exits(server, *clients)
    for client in clients:
        reported = re.findall(
            r"round (\d) step (\d): loss=\S+ largest_gradient=\S+ lr=(\S+)", "\n".join(client.lines)
        )
        assert [(values[0], values[1]) for values in reported] == [
            ("1", "2"),
            ("1", "4"),
            ("2", "2"),
            ("2", "4"),
        ]
        expected = [0.02 * (1 + math.cos(math.pi * k / 8)) for k in (1, 3, 5, 7)]
        assert [float(values[2]) for values in reported] == pytest.approx(expected, rel=1e-3)


def test_a_label_no_class_stops_a_client_with_a_sentence(scene: Scene) -> None:
    """The same task on a server starts; the client whose labels are off says which."""
    raw = scene.folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(3 * 784)
    )
    (raw / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 12, 2]))
    (raw / "t10k-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(784)
    )
    (raw / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 3]))
    server = scene.server("--task", "mnist", "--data-root", scene.folder)
    client = scene.client(0, server.address, "--source", "local", "--data-root", scene.folder)
    assert client.wait() == 1
    assert client.count_lines(r"example 1 \(from 0\) has the label 12; labels go from 0 to 9") == 1
    assert client.count_lines("^Traceback") == 0
