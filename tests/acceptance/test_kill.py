"""kill -9 leaves the final model unchanged (under --require-all): design promise 4.

Every test here kills one side at a moment chosen by a seed and counted in events (updates stored,
training steps, bytes of an upload), proves that the kill landed where it was meant to, starts the
same command again, and compares every round's digest and evaluation with a run nobody disturbed.

One seed by default; `FED_KILL_SEEDS=20 pytest tests/acceptance/test_kill.py` runs twenty.
"""

import os
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.acceptance.conftest import CLIENTS, NUM_ROUNDS, Undisturbed, run_flags
from tests.acceptance.federation import (
    BIG,
    TINY,
    expect_clean_exits,
    start_client,
    start_server,
    verdicts,
)
from tests.faulty_wire import Way, wire_to
from tests.processes import Process, Scene, fixed_port, wait_until

SEEDS = range(int(os.environ.get("FED_KILL_SEEDS", "1")))
NUM_STEPS = {0: 8, 1: 10, 2: 12}
"""Of a client in a round of `tiny`: 2 epochs of 4, 5 and 6 batches (see tiny_task)."""

pytestmark = pytest.mark.parametrize("seed", SEEDS)


def what_matters(history: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what must be the same with and without kills."""
    return [
        (entry["round"], entry["attempt"], entry["model_digest"], entry["evaluation"])
        for entry in history
    ]


def expect_unchanged(scene: Scene, task: str, expected: list[dict[str, Any]]) -> None:
    """Compare a disturbed run that has ended with the undisturbed one."""
    history = scene.history()
    assert verdicts(history) == [
        (number, client, "COUNTED")
        for number in range(1, NUM_ROUNDS[task] + 1)
        for client in CLIENTS
    ]
    assert what_matters(history) == what_matters(expected)
    assert all(entry["evaluation"] is not None for entry in history)


def open_order(scene: Scene, client_id: int) -> dict[str, Any]:
    """Return the order of the round that goes on, from outside; it must be OPEN."""
    last = scene.history()[-1]
    assert last["phase"] == "COLLECTING"
    (order,) = (order for order in last["orders"] if order["client"] == client_id)
    assert order["state"] == "OPEN", order
    assert isinstance(order, dict)
    return order


def test_a_server_killed_in_the_middle_of_rounds_ends_in_the_same_models(
    scene: Scene, undisturbed: Undisturbed, seed: int, record_property: Callable[[str, str], None]
) -> None:
    """Two kills of the server at seeded events change no digest, and every order counts once."""
    expected = undisturbed(TINY).history
    rng = random.Random(f"server {seed}")
    port = fixed_port()
    server = start_server(scene, *run_flags(TINY, port))
    clients = [
        start_client(scene, client_id, server.address, TINY_STEP_S="0.01", TINY_TRACE="1")
        for client_id in CLIENTS
    ]
    for _ in range(2):
        moment = rng.choice(["update-stored", "round-opened", "round-closed", "a client's step"])
        if moment == "a client's step":
            watched: Process = rng.choice(clients)
            watched.wait_for_line("tiny-step", times=watched.count_lines("tiny-step") + 7)
        else:
            server.wait_for_line(moment, times=rng.randint(1, 2 if "round" in moment else 6))
        # Not a wait for anything: the kill is to land somewhere after the event, not right at it.
        time.sleep(rng.uniform(0, 0.03))
        killed_at = datetime.now(UTC)
        server.kill()

        struck = scene.history()[-1]
        assert struck["phase"] in ("COLLECTING", "AGGREGATING"), "the kill landed outside a round"
        assert datetime.fromisoformat(struck["started_at"]) < killed_at
        states = ",".join(order["state"] for order in struck["orders"])
        record_property("landed", f"{moment}: round {struck['round']} {struck['phase']} {states}")

        server = start_server(scene, *run_flags(TINY, port))
        server.wait_for_line("server-restarted")
        entry = scene.history()[struck["round"] - 1]
        restarts = [
            incident for incident in entry["incidents"] if incident["kind"] == "server-restarted"
        ]
        assert datetime.fromisoformat(restarts[-1]["at"]) > killed_at
    expect_clean_exits(server, *clients)
    expect_unchanged(scene, TINY, expected)


def test_a_client_killed_in_the_middle_of_training_ends_in_the_same_models(
    scene: Scene, undisturbed: Undisturbed, seed: int, record_property: Callable[[str, str], None]
) -> None:
    """A client killed at a seeded training step trains the same order again, to the same bytes."""
    expected = undisturbed(TINY).history
    rng = random.Random(f"training {seed}")
    victim_id = rng.choice(CLIENTS)
    step = rng.randint(1, NUM_STEPS[victim_id] * (NUM_ROUNDS[TINY] - 1))
    server = start_server(scene, *run_flags(TINY, 0))
    clients = {
        client_id: start_client(scene, client_id, server.address)
        for client_id in CLIENTS
        if client_id != victim_id
    }

    def start_victim() -> Process:
        return start_client(scene, victim_id, server.address, TINY_STEP_S="0.03", TINY_TRACE="1")

    victim = start_victim()
    # The step takes 0.03 s more from this line on.
    victim.wait_for_line(f"tiny-step {step}$")
    victim.kill()
    assert victim.lines[-1] == f"tiny-step {step}", "the kill landed after the step"
    order = open_order(scene, victim_id)
    outbox = scene.folder / f"client-{victim_id}" / "outbox"
    assert not (outbox / f"{order['order_id']}.json").exists(), "training was over"
    record_property("landed", f"client {victim_id} at step {step}, {order['order_id']}")

    expect_clean_exits(server, start_victim(), *clients.values())
    expect_unchanged(scene, TINY, expected)


def test_many_clients_in_one_process_that_is_killed_end_in_the_models_of_many_processes(
    scene: Scene, undisturbed: Undisturbed, seed: int, record_property: Callable[[str, str], None]
) -> None:
    """Killed while one of its ids trains, and others wait for their turn or are done with it."""
    expected = undisturbed(TINY).history
    rng = random.Random(f"many {seed}")
    step = rng.randint(1, sum(NUM_STEPS.values()) * (NUM_ROUNDS[TINY] - 1))
    server = start_server(scene, *run_flags(TINY, 0))

    def start_all() -> Process:
        return start_client(scene, "0-2", server.address, TINY_STEP_S="0.01", TINY_TRACE="1")

    victim = start_all()
    victim.wait_for_line(f"tiny-step {step}$")
    victim.kill()
    struck = scene.history()[-1]
    states = ",".join(order["state"] for order in struck["orders"])
    record_property("landed", f"step {step}: round {struck['round']} {states}")

    again = start_all()
    expect_clean_exits(server, again)
    expect_unchanged(scene, TINY, expected)
    # Each client's own state was there: none of them was said to have lost it.
    assert not any(entry["incidents"] for entry in scene.history())


def test_both_sides_killed_in_the_middle_of_uploads_end_in_the_same_models(
    scene: Scene, undisturbed: Undisturbed, seed: int, record_property: Callable[[str, str], None]
) -> None:
    """An upload cut by a kill of either side goes on where it was committed, and counts once."""
    expected = undisturbed(BIG).history
    rng = random.Random(f"upload {seed}")
    numbers = sorted(rng.sample(range(1, NUM_ROUNDS[BIG] + 1), 2))
    port = fixed_port()
    server = start_server(scene, *run_flags(BIG, port), task=BIG)
    wire = wire_to(scene, server.address)
    victim_id = rng.choice(CLIENTS)
    clients = {
        client_id: start_client(
            scene, client_id, wire.address if client_id == victim_id else server.address, task=BIG
        )
        for client_id in CLIENTS
    }
    for number, struck in zip(numbers, rng.sample(["client", "server"], 2), strict=True):
        server.wait_for_line(f"round-opened round={number} ")
        # Only an upload is this large.
        wire.hold(Way.UP, after_bytes=rng.randint(3_000_000, 25_000_000))
        wire.wait_until_held(Way.UP)
        spool = scene.folder / "server" / "spool"
        upload = f"*-r{number}-*-c{victim_id}-*"
        wait_until(
            lambda: any(path.stat().st_size for path in spool.glob(upload)),  # noqa: B023
            what="the server to write the first of the bytes that have arrived",
        )
        (server if struck == "server" else clients[victim_id]).kill()

        order = open_order(scene, victim_id)
        (spooled,) = spool.glob(f"{order['order_id']}.*")
        outbox = scene.folder / f"client-{victim_id}" / "outbox"
        size_bytes = (outbox / f"{order['order_id']}.safetensors").stat().st_size
        committed_bytes = spooled.stat().st_size
        assert 0 < committed_bytes < size_bytes, "the kill landed outside the upload"
        landed = f"{struck}: {order['order_id']} at byte {committed_bytes} of {size_bytes}"
        record_property("landed", landed)

        num_links = len(wire.links)
        wire.release()
        if struck == "server":
            server = start_server(scene, *run_flags(BIG, port), task=BIG)
        else:
            clients[victim_id] = start_client(scene, victim_id, wire.address, task=BIG)
        # Restarted, a client knows the order's id alone.
        round_of = f"client {victim_id}, round {number}"
        of = round_of if struck == "server" else f"order {order['order_id']}"
        clients[victim_id].wait_for_line(f"{of}: update (stored|duplicate)")
        # What was committed isn't sent again: the rest goes up, and the small calls. (What the
        # struck side had sent still arrives on the old connection; the new stream fences it.)
        sent_again = wire.passed_bytes(Way.UP, since_link=num_links)
        assert sent_again < size_bytes - committed_bytes + (1 << 20)
    expect_clean_exits(server, *clients.values())
    expect_unchanged(scene, BIG, expected)
