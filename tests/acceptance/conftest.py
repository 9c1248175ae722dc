"""The run nobody disturbs, made once for every test that compares with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.federation import (
    BIG,
    TINY,
    expect_clean_exits,
    start_client,
    start_server,
)
from tests.processes import Process, Scene, Server

CLIENTS = (0, 1, 2)
NUM_ROUNDS = {TINY: 6, BIG: 3}


@dataclass(frozen=True)
class Run:
    """A run that has ended: its processes, what the history says of it, the server's folder."""

    server: Server
    clients: list[Process]
    history: list[dict[str, Any]]
    folder: Path


Undisturbed = Callable[[str], Run]


def run_flags(task: str, port: int) -> list[str | int]:
    """Return the server's flags for the run, the same at every start.

    On a busy machine it waits long enough at the end for every client to hear of it.
    """
    return [
        *("--port", port, "--rounds", NUM_ROUNDS[task], "--min-clients", len(CLIENTS)),
        *("--require-all", "--seed", 5, "--farewell", 120),
    ]


@pytest.fixture(scope="session")
def undisturbed(session_scene: Scene) -> Undisturbed:
    """Give a function that makes the run of a task, or finds it made; its updates are kept."""
    made: dict[str, Run] = {}

    def find(task: str) -> Run:
        if task not in made:
            state = f"undisturbed-{len(made)}"
            flags = [*run_flags(task, 0), "--keep-updates", "all"]
            server = start_server(session_scene, *flags, task=task, state=state)
            clients = [
                start_client(
                    session_scene,
                    client_id,
                    server.address,
                    task=task,
                    state=f"{state}-client-{client_id}",
                )
                for client_id in CLIENTS
            ]
            expect_clean_exits(server, *clients)
            history = session_scene.history(state=state)
            made[task] = Run(server, clients, history, session_scene.folder / state)
        return made[task]

    return find
