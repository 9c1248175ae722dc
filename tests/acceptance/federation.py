"""Whole federations for acceptance tests: one server, some clients, the tiny task."""

from pathlib import Path
from typing import Any

from tests.processes import Process, Scene, Server
from tests.tiny_task import BATCH_SIZE

TINY = "tests.tiny_task:tiny"
BIG = "tests.tiny_task:big"
NO_CLOCK = ("--stall-after", 3600, "--lease", 3600, "--first-step", 3600, "--farewell", 240)
"""Flags of a server by which no order, session or end comes by time, however slow the machine."""


def start_server(scene: Scene, *flags: str | float | Path, task: str = TINY, **kept: str) -> Server:
    """Start a server with the tests' task and batches; flags given later win over these."""
    return scene.server("--task", task, "--batch-size", BATCH_SIZE, *flags, **kept)


def start_client(
    scene: Scene,
    client_id: int | str,
    address: str,
    *flags: str | float | Path,
    task: str = TINY,
    **kept: str,
) -> Process:
    """Start a client, or many in one process ("0-2"), that trusts the tests' task."""
    return scene.client(client_id, address, "--task", task, *flags, **kept)


def expect_clean_exits(*processes: Process) -> None:
    """Wait for processes to end by themselves, each with exit code 0 and without a traceback."""
    for process in processes:
        code = process.wait()
        assert code == 0, f"{process.name} ended with {code}"
        assert process.count_lines("^Traceback") == 0, f"{process.name} shows a traceback"


def verdicts(history: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    """Return (round, client, state) of every order of every attempt."""
    return [
        (entry["round"], order["client"], order["state"])
        for entry in history
        for order in entry["orders"]
    ]


def incident_kinds(history: list[dict[str, Any]]) -> list[str]:
    """Return the kinds of all incidents, in order."""
    return [incident["kind"] for entry in history for incident in entry["incidents"]]
