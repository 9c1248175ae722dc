"""Which clients have stalled: a function of values; and how their orders end."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedrounds.types import ClientAlgorithmConfig, Section, TrainingConfig
from fedserver.clients.stalls import (
    Progress,
    Stall,
    StallBounds,
    Work,
    find_loss,
    find_stall,
    give_up_orders,
    most_credible_examples,
    stall_bounds,
    total_bound_s,
    work_of,
)
from tests.factories import make_order, make_registration
from tests.server_run import ServerRun, serving

BOUNDS = StallBounds(silence_s=60, first_step_s=600, examples_per_s=0.1, bytes_per_s=10_000)
WORK = Work(num_examples=600, num_bytes=3_000_000)
BOUND_S = 600 + 600 / 0.1 + 3_000_000 / 10_000


def stall_of(
    *,
    silent_s: float = 0,
    idle_s: float = 0,
    total_s: float = 0,
    longest_step_s: float | None = None,
    work: Work = WORK,
) -> Stall | None:
    """Return why a client with this progress has stalled."""
    progress = Progress(
        silent_s=silent_s, idle_s=idle_s, total_s=total_s, longest_step_s=longest_step_s
    )
    return find_stall(progress, work, BOUNDS)


def test_a_silent_client_has_stalled() -> None:
    """Whatever its steps took so far: a client that works reports every second."""
    assert stall_of(silent_s=60, idle_s=60, longest_step_s=300) is None
    assert stall_of(silent_s=60.1, idle_s=60.1, longest_step_s=300) is Stall.SILENT


def test_a_first_step_has_the_time_of_its_setting() -> None:
    """A batch longer than the silence allowed hasn't stalled while its client is heard of."""
    assert stall_of(silent_s=1, idle_s=600) is None
    assert stall_of(silent_s=1, idle_s=600.1) is Stall.NO_PROGRESS


@pytest.mark.parametrize(
    ("longest_step_s", "bound_s"),
    [
        # Quick steps: a pause as long as a silence is nothing unusual.
        (0.01, 60),
        (6, 60),
        # Long steps: ten times the longest.
        (7, 70),
        (300, 3000),
    ],
)
def test_a_step_has_ten_times_the_longest_so_far(longest_step_s: float, bound_s: float) -> None:
    """A client is compared with itself alone."""
    assert stall_of(idle_s=bound_s, longest_step_s=longest_step_s) is None
    stall = stall_of(idle_s=bound_s + 0.1, longest_step_s=longest_step_s)
    assert stall is Stall.NO_PROGRESS


def test_whoever_makes_tiny_progress_for_ever_is_late_in_the_end() -> None:
    """The time of all examples and bytes at the slowest rates, and of a first step, is all."""
    assert total_bound_s(WORK, BOUNDS) == BOUND_S
    assert stall_of(idle_s=1, total_s=BOUND_S, longest_step_s=2) is None
    assert stall_of(idle_s=1, total_s=BOUND_S + 0.1, longest_step_s=2) is Stall.TOO_LONG


def test_a_site_with_a_hundred_times_the_data_has_a_hundred_times_the_time() -> None:
    """At the same pace both are in time, or neither is."""
    large = Work(num_examples=100 * WORK.num_examples, num_bytes=WORK.num_bytes)
    at_own_pace_s = 100 * 600 / 0.2
    assert stall_of(idle_s=1, total_s=at_own_pace_s, longest_step_s=2, work=large) is None
    assert stall_of(idle_s=1, total_s=at_own_pace_s, longest_step_s=2) is Stall.TOO_LONG


def test_a_claim_of_far_more_examples_than_others_have_buys_no_time() -> None:
    """A hundred times the median is credible; a liar moves the median little."""
    assert most_credible_examples([300, 300, 300, 10**7]) == 100 * 300
    assert most_credible_examples([300, 300, 10**7]) == math.inf
    assert most_credible_examples([]) == math.inf


def test_an_order_nobody_pulls_is_lost_however_alive_its_session_is() -> None:
    """With the session's lease, or when its client could have pulled it for long enough."""

    def loss(*, is_session_live: bool, waiting_s: float) -> Stall | None:
        return find_loss(is_session_live=is_session_live, waiting_s=waiting_s, bounds=BOUNDS)

    assert loss(is_session_live=True, waiting_s=600) is None
    assert loss(is_session_live=True, waiting_s=600.1) is Stall.NEVER_PULLED
    assert loss(is_session_live=False, waiting_s=1) is Stall.GONE


def test_what_an_order_asks_for() -> None:
    """Epochs, evaluations and transfers of a client with ten examples."""
    order = make_order()
    plain = TrainingConfig(epochs=3, batch_size=1024)
    sections = (Section(name="model", digest="d", size_bytes=500),)

    def work(*, evaluate: bool = False, training: TrainingConfig = plain) -> Work:
        asked = replace(order, training=training, sections=sections, evaluate=evaluate)
        return work_of(asked, num_examples=10)

    assert work() == Work(num_examples=30, num_bytes=1500)
    # It evaluates 256 examples at a time first: a step of training may take four times as long.
    assert work(evaluate=True) == Work(num_examples=40, num_bytes=1500, step_ratio=4)
    # Under Ditto another model is trained and evaluated beside the global one.
    ditto = replace(plain, client_algorithm=ClientAlgorithmConfig(name="ditto"))
    assert work(evaluate=True, training=ditto).num_examples == 80


SETTINGS: dict[str, Any] = {
    "min_clients": 2,
    "min_updates": 1,
    "lease": 60,
    "stall_after": 100,
    "first_step": 600,
}


async def give_up(server: ServerRun) -> list[tuple[str, int | None]]:
    """Give up the stalled orders; returns the kinds and clients of the events."""
    server.events.clear()
    await give_up_orders(
        server.settings,
        run_id=server.run.run_id,
        sessions=server.sessions,
        open_orders=server.open_orders,
        store=server.recording,
    )
    return [(event.kind, event.client_id) for event in server.events]


async def pull(server: ServerRun, client_id: int) -> None:
    """Let a client pull its order."""
    await server.client_api.pull_work(server.session_ids[client_id], wait_s=0)


def test_a_late_order_ends_and_its_client_is_suspended(tmp_path: Path) -> None:
    """Client 0 has pulled and is silent; client 1 never came and its lease is over."""

    async def wait(server: ServerRun) -> None:
        await server.begin(0, 1)
        await pull(server, 0)
        server.clock.now_s += 59.9
        assert await give_up(server) == []
        server.clock.now_s += 0.1
        assert await give_up(server) == [("client-lost", 1)]
        assert server.events[0].fields["why"] == "gone"
        server.clock.now_s += 40
        assert await give_up(server) == []
        server.clock.now_s += 1
        assert await give_up(server) == [("client-stalled", 0)]
        assert server.events[0].fields["why"] == "silent"
        assert "total_s" not in server.events[0].fields
        assert server.states(server.latest()) == {0: "ABANDONED", 1: "ABANDONED"}
        assert sorted(server.store.quarantine.suspensions(server.run.run_id)) == [0, 1]
        assert await give_up(server) == []

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(wait(server))


def test_an_order_of_a_client_in_no_session_ends_without_a_strike(tmp_path: Path) -> None:
    """Its process came back with fewer ids."""

    async def come_back(server: ServerRun) -> None:
        await server.register(0, 1)
        await server.go_on()
        server.sessions.register(make_registration(1, instance_key="instance-(0, 1)"))
        assert await give_up(server) == [("client-left", 0)]
        assert server.events[0].fields == {"reason": "not here any more"}
        assert server.store.quarantine.suspensions(server.run.run_id) == {}

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(come_back(server))


def test_an_order_does_not_age_while_its_session_works_on_another(tmp_path: Path) -> None:
    """One process serves two clients in turn: the second order has its whole time."""

    async def work(server: ServerRun) -> None:
        session_id = await server.register(0, 1)
        server.session_ids |= {0: session_id, 1: session_id}
        await server.go_on()
        await pull(server, 0)
        for _ in range(20):
            server.clock.now_s += 50
            server.open_orders.note_bytes(server.order_of(0).order_id)
            server.sessions.touch(session_id)
            assert await give_up(server) == []

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(work(server))


def test_a_client_that_is_expected_back_has_a_lease_to_come(tmp_path: Path) -> None:
    """Then its order ends, without a strike."""

    async def leave(server: ServerRun) -> None:
        await server.begin(0, 1)
        for client_id in (0, 1):
            await pull(server, client_id)
        server.sessions.leave([0], expected=[0])
        server.clock.now_s += 60
        assert await give_up(server) == []
        server.clock.now_s += 0.5
        assert await give_up(server) == [("client-left", 0)]
        assert server.store.quarantine.suspensions(server.run.run_id) == {}

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(leave(server))


def test_a_run_that_requires_all_gives_nobody_up(tmp_path: Path) -> None:
    """However long it takes."""

    async def wait(server: ServerRun) -> None:
        await server.begin(0, 1)
        await pull(server, 0)
        server.clock.now_s += 1e6
        assert await give_up(server) == []

    with serving(tmp_path, require_all=True, **SETTINGS) as server:
        asyncio.run(wait(server))


def test_an_order_that_takes_too_long_in_all_says_how_long(tmp_path: Path) -> None:
    """Tiny progress for ever is no honest work."""

    async def crawl(server: ServerRun) -> None:
        await server.begin(0, 1)
        for client_id in (0, 1):
            await pull(server, client_id)
        order = server.open_orders.find(server.order_of(0).order_id)
        assert order is not None
        bound_s = total_bound_s(
            work_of(order.order, num_examples=server.sessions.num_examples_of(0)),
            stall_bounds(server.settings),
        )
        events: list[tuple[str, int | None]] = []
        while not events:
            server.clock.now_s += 50
            for client_id in (0, 1):
                server.sessions.touch(server.session_ids[client_id])
                server.open_orders.note_bytes(server.order_of(client_id).order_id)
            events = await give_up(server)
        assert events == [("client-stalled", 0), ("client-stalled", 1)]
        assert server.events[0].fields["why"] == "too-long"
        assert bound_s < server.events[0].fields["total_s"] <= bound_s + 50

    with serving(tmp_path, min_examples_per_s=1, **SETTINGS) as server:
        asyncio.run(crawl(server))
