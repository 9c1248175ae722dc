"""Kill -9 and SIGSTOP of either side at every fail point of the data's path.

The environment arms the fail point in one process; nothing else knows that a fault is coming. Each
test shows from outside that the fault struck where it was meant to, then starts the same command
again (or sends SIGCONT), and compares every model with those of the undisturbed run.
"""

import signal
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from fedrounds.failpoints import VARIABLE, FailPoint
from tests.acceptance.conftest import CLIENTS, NUM_ROUNDS, Undisturbed, run_flags
from tests.acceptance.faults.aftermath import conclude, expect_same_models, now
from tests.acceptance.faults.test_bad_models import BAD_MODEL_FAIL_POINTS
from tests.acceptance.faults.test_other_ends import OTHER_FAIL_POINTS
from tests.acceptance.federation import (
    TINY,
    expect_clean_exits,
    incident_kinds,
    start_client,
    start_server,
    verdicts,
)
from tests.processes import Process, Scene, fixed_port, wait_until
from tests.tiers import FULL

VICTIM = 1

SERVER_FAIL_POINTS = {
    FailPoint.ROUND_OPENED: (1, 1, "COLLECTING"),
    FailPoint.UPDATE_DURABLE: (5, 2, "COLLECTING"),
    FailPoint.UPDATE_RECORDED: (5, 2, "COLLECTING"),
    FailPoint.ROUND_CLOSING: (2, 2, "COLLECTING"),
    FailPoint.ROUND_CLOSED: (2, 2, "AGGREGATING"),
    FailPoint.MODEL_WRITTEN: (2, 2, "AGGREGATING"),
    FailPoint.ROUND_DONE: (2, 3, "COLLECTING"),
    FailPoint.EVALUATED: (2, 3, "COLLECTING"),
    FailPoint.RUN_EXPORTED: (1, NUM_ROUNDS[TINY], "DONE"),
}
"""How often the server comes by until the fault strikes, and where the run then stands: the round
that began last and its phase. Three clients deliver in each round; the first round alone is opened
by itself, the others in the transaction that ends the round before."""

CLIENT_FAIL_POINTS = {
    FailPoint.ORDER_PULLED: ("OPEN",),
    FailPoint.MODEL_FETCHED: ("OPEN",),
    FailPoint.TRAINED: ("OPEN",),
    FailPoint.UPDATE_KEPT: ("OPEN",),
    FailPoint.RECEIPT_GIVEN: ("STORED", "COUNTED"),
}
"""Where its order of the second round then stands; with the receipt, that round may end."""

QUICK = {("kill", FailPoint.ROUND_CLOSED), ("halt", FailPoint.TRAINED)}
"""What plain `pytest` runs."""


def cases(action: str, among: dict[FailPoint, Any]) -> list[Any]:
    """Return the parameters of a test: quick cases, and the rest with the whole suite's mark."""
    return [
        pytest.param(
            fail_point, id=str(fail_point), marks=() if (action, fail_point) in QUICK else FULL
        )
        for fail_point in among
    ]


def test_every_fail_point_is_struck_on_one_side() -> None:
    """A new fail point comes with its row here."""
    in_test_upgrades = FailPoint.UPGRADE_MADE
    struck = {
        in_test_upgrades,
        *SERVER_FAIL_POINTS,
        *CLIENT_FAIL_POINTS,
        *OTHER_FAIL_POINTS,
        *BAD_MODEL_FAIL_POINTS,
    }
    assert struck == set(FailPoint)


def expect_whole_run(scene: Scene, undisturbed: Undisturbed) -> None:
    """Compare a run that has ended with the undisturbed run: all of its models."""
    history = scene.history()
    expect_same_models(history, undisturbed(TINY).history)
    assert len(history) == NUM_ROUNDS[TINY]


def wait_until_halted(process: Process) -> None:
    """Return once SIGSTOP has taken effect."""
    wait_until(lambda: process.is_halted, what=f"{process.name} to be halted")


def go_on(process: Process) -> datetime:
    """Let a halted process go on; returns when."""
    at = now()
    process.signal(signal.SIGCONT)
    return at


def expect_server_struck(scene: Scene, fail_point: FailPoint) -> str:
    """Check that the server stands at the fail point; returns that in words."""
    _, number, phase = SERVER_FAIL_POINTS[fail_point]
    last = scene.history()[-1]
    assert (last["round"], last["phase"]) == (number, phase)
    stored = [order["client"] for order in last["orders"] if order["state"] == "STORED"]
    whole = list((scene.folder / "server" / "models").glob("*.safetensors"))
    exported = (scene.folder / "server" / "model.safetensors").exists()
    shown: dict[FailPoint, Callable[[], bool]] = {
        # The first model and one for every round done before; here the next one is there too.
        FailPoint.MODEL_WRITTEN: lambda: len(whole) == number + 1,
        FailPoint.ROUND_CLOSED: lambda: len(whole) == number,
        FailPoint.ROUND_CLOSING: lambda: len(stored) == len(CLIENTS),
        # The store's thread may have recorded the third before the second passed the fail point.
        FailPoint.UPDATE_RECORDED: lambda: len(stored) in (2, 3),
        FailPoint.EVALUATED: lambda: scene.history()[number - 2]["evaluation"] is None,
        FailPoint.RUN_EXPORTED: lambda: exported,
    }
    assert shown.get(fail_point, lambda: True)(), f"the fault struck elsewhere: {last}"
    return f"round {number} {phase}, {len(stored)} updates recorded"


@pytest.mark.parametrize("fail_point", cases("kill", SERVER_FAIL_POINTS))
def test_a_server_killed_at(scene: Scene, fail_point: FailPoint, undisturbed: Undisturbed) -> None:
    """Started again with the same command it ends in the same models."""
    times, _, _ = SERVER_FAIL_POINTS[fail_point]
    port = fixed_port()
    armed = {VARIABLE: f"{fail_point}:kill:{times}"}
    server = start_server(scene, *run_flags(TINY, port), **armed)
    clients = [start_client(scene, client_id, server.address) for client_id in CLIENTS]
    assert server.wait() == -signal.SIGKILL
    struck_at = now()
    landed = expect_server_struck(scene, fail_point)
    server = start_server(scene, *run_flags(TINY, port))
    expect_clean_exits(server, *clients)
    expect_whole_run(scene, undisturbed)
    conclude(
        scene, fault=f"kill -9 of the server at {fail_point}", struck_at=struck_at, seen=[landed]
    )


@pytest.mark.parametrize("fail_point", cases("halt", SERVER_FAIL_POINTS))
def test_a_server_halted_at(scene: Scene, fail_point: FailPoint, undisturbed: Undisturbed) -> None:
    """Silent until its clients say that nobody answers, it goes on as if nothing was."""
    times, _, _ = SERVER_FAIL_POINTS[fail_point]
    server = start_server(
        scene, *run_flags(TINY, fixed_port()), **{VARIABLE: f"{fail_point}:halt:{times}"}
    )
    clients = [start_client(scene, client_id, server.address) for client_id in CLIENTS]
    # Only once it listens can it come by.
    server.wait_for_line("fedserver listening on")
    wait_until_halted(server)
    landed = expect_server_struck(scene, fail_point)
    clients[0].wait_for_line("no answer from")
    struck_at = go_on(server)
    expect_clean_exits(server, *clients)
    expect_whole_run(scene, undisturbed)
    seen = [landed, "the clients noticed"]
    conclude(scene, fault=f"SIGSTOP of the server at {fail_point}", struck_at=struck_at, seen=seen)


def expect_client_struck(scene: Scene, fail_point: FailPoint) -> str:
    """Check that the client stands at the fail point; returns that in words."""
    entry = scene.history()[1]
    (order,) = (order for order in entry["orders"] if order["client"] == VICTIM)
    assert order["state"] in CLIENT_FAIL_POINTS[fail_point], f"the fault struck elsewhere: {order}"
    folder = scene.folder / f"client-{VICTIM}"
    has_model = (folder / "blobs" / entry["base_digest"]).exists()
    is_kept = (folder / "outbox" / f"{order['order_id']}.json").exists()
    assert has_model == (fail_point is not FailPoint.ORDER_PULLED)
    assert is_kept == (fail_point in (FailPoint.UPDATE_KEPT, FailPoint.RECEIPT_GIVEN))
    return f"its order of round 2 {order['state']}"


@pytest.mark.parametrize("fail_point", cases("kill", CLIENT_FAIL_POINTS))
def test_a_client_killed_at(scene: Scene, fail_point: FailPoint, undisturbed: Undisturbed) -> None:
    """Started again with the same command it delivers the same order, once."""
    server = start_server(scene, *run_flags(TINY, 0))
    others = [
        start_client(scene, client_id, server.address)
        for client_id in CLIENTS
        if client_id != VICTIM
    ]
    victim = start_client(scene, VICTIM, server.address, **{VARIABLE: f"{fail_point}:kill:2"})
    assert victim.wait() == -signal.SIGKILL
    struck_at = now()
    landed = expect_client_struck(scene, fail_point)
    victim = start_client(scene, VICTIM, server.address)
    expect_clean_exits(server, victim, *others)
    expect_whole_run(scene, undisturbed)
    conclude(
        scene,
        fault=f"kill -9 of a client at {fail_point}",
        struck_at=struck_at,
        seen=[landed],
        client_id=VICTIM,
    )


@pytest.mark.parametrize("fail_point", cases("halt", CLIENT_FAIL_POINTS))
def test_a_client_halted_at(scene: Scene, fail_point: FailPoint, undisturbed: Undisturbed) -> None:
    """Silent until everybody else waits for it, it goes on as if nothing was."""
    server = start_server(scene, *run_flags(TINY, 0))
    others = [
        start_client(scene, client_id, server.address)
        for client_id in CLIENTS
        if client_id != VICTIM
    ]
    victim = start_client(scene, VICTIM, server.address, **{VARIABLE: f"{fail_point}:halt:2"})
    wait_until_halted(victim)
    landed = expect_client_struck(scene, fail_point)
    # All that can come before it goes on: 3 of round 1, and 2 of the round that waits for it.
    num_rounds = 3 if fail_point is FailPoint.RECEIPT_GIVEN else 2
    server.wait_for_line("update-stored", times=3 * num_rounds - 1)
    struck_at = go_on(victim)
    expect_clean_exits(server, victim, *others)
    expect_whole_run(scene, undisturbed)
    conclude(
        scene,
        fault=f"SIGSTOP of a client at {fail_point}",
        struck_at=struck_at,
        seen=[landed, "everybody waited"],
        client_id=VICTIM,
    )


@FULL
@pytest.mark.parametrize("fail_point", [FailPoint.MODEL_FETCHED, FailPoint.UPDATE_KEPT])
def test_a_client_halted_too_long_is_done_without_and_taken_back(
    scene: Scene, fail_point: FailPoint
) -> None:
    """Without --require-all a silent client's order is given up; later it takes part again.

    What it then sends for the old order is late: it is on record and in no model.
    """
    server = start_server(
        scene,
        *("--rounds", 20, "--min-clients", 3, "--min-updates", 2, "--seed", 5),
        *("--stall-after", 15, "--lease", 120, "--farewell", 120),
    )
    slow = {"TINY_STEP_S": "0.05"}
    others = [
        start_client(scene, client_id, server.address, **slow)
        for client_id in CLIENTS
        if client_id != VICTIM
    ]
    victim = start_client(scene, VICTIM, server.address, **{VARIABLE: f"{fail_point}:halt:2"})
    wait_until_halted(victim)
    landed = expect_client_struck(scene, fail_point)
    server.wait_for_line("client-stalled")
    struck_at = go_on(victim)
    expect_clean_exits(server, victim, *others)
    history = scene.history()
    assert {entry["phase"] for entry in history} == {"DONE"}
    given_up = [(2, VICTIM, "ABANDONED")]
    assert [verdict for verdict in verdicts(history) if verdict[2] != "COUNTED"] == given_up
    assert (history[-1]["round"], VICTIM, "COUNTED") in verdicts(history)
    assert set(incident_kinds(history)) <= {"client-stalled", "update-late"}
    conclude(
        scene,
        fault=f"SIGSTOP of a client at {fail_point}, given up",
        struck_at=struck_at,
        seen=[landed],
        client_id=VICTIM,
    )
