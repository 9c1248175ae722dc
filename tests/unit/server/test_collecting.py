"""Until a round may close: the synchronous policy, and the wait of the round loop."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedrounds.types import Counters, RunFailure
from fedserver.phases import OrderState, RoundEvent
from fedserver.rounds.collecting import Due, verdict_text, wait_until_due
from tests.server_run import TICK_S, ServerRun, serving

NO_EXAMPLES = {"num_examples": 0}
"""Refused: an update that rests on nothing."""


def test_a_round_waits_for_its_cohort_then_closes(tmp_path: Path) -> None:
    """Enough updates alone aren't the end: another client may still answer."""

    async def collect(server: ServerRun) -> list[Due | None]:
        current, _ = await server.begin(0, 1)
        dues = [await server.collecting.due(current)]
        for client_id in (0, 1):
            await server.answer(client_id)
            dues.append(await server.collecting.due(current))
        return dues

    with serving(tmp_path, min_clients=2, min_updates=1) as server:
        assert asyncio.run(collect(server)) == [None, None, Due(event=RoundEvent.CLOSE)]


def test_a_round_that_asked_more_than_it_needs_closes_when_enough_have_answered(
    tmp_path: Path,
) -> None:
    """--over-select: whoever is slower is left out."""

    async def collect(server: ServerRun) -> Due | None:
        current, _ = await server.begin(0, 1)
        await server.answer(0)
        return await server.collecting.due(current)

    with serving(tmp_path, min_clients=2, clients_per_round=1, over_select=2) as server:
        assert asyncio.run(collect(server)) == Due(event=RoundEvent.CLOSE)


def test_the_deadline_closes_a_round_that_has_enough_updates(tmp_path: Path) -> None:
    """By the clock of the open orders, since the round opened here."""

    async def collect(server: ServerRun) -> list[Due | None]:
        current, _ = await server.begin(0, 1)
        await server.answer(0)
        server.clock.now_s += 60
        in_time = await server.collecting.due(current)
        server.clock.now_s += 0.5
        return [in_time, await server.collecting.due(current)]

    with serving(tmp_path, min_clients=2, min_updates=1, round_deadline=60) as server:
        assert asyncio.run(collect(server)) == [None, Due(event=RoundEvent.CLOSE)]


async def refuse_then_give_up(server: ServerRun) -> Due | None:
    """Let client 0's update be refused and client 1 give up; return what the round is due for."""
    current, _ = await server.begin(0, 1)
    await server.answer(0, **NO_EXAMPLES)
    order = server.order_of(1)
    await server.client_api.report_progress(
        server.session_ids[1], order.order_id, counters=Counters(), incidents=[], gave_up=True
    )
    return await server.collecting.due(current)


def test_a_round_that_fails_names_the_client_whose_update_was_refused(tmp_path: Path) -> None:
    """Two updates are needed and one client gave up: the refusal isn't why."""
    with serving(tmp_path, min_clients=2) as server:
        due = asyncio.run(refuse_then_give_up(server))
    assert due is not None
    assert (due.event, due.failure) == (RoundEvent.FAIL, RunFailure.TOO_FEW_UPDATES)
    assert due.reason == (
        "0 of 2 updates are there, and none can still come; the update of client 0 was refused: "
        "num_examples is 0; it must lie in 1 to 10000000"
    )


def test_refusals_are_why_a_round_fails_that_would_have_had_enough(tmp_path: Path) -> None:
    """One update is needed, and client 0's would have been it."""
    with serving(tmp_path, min_clients=2, min_updates=1) as server:
        due = asyncio.run(refuse_then_give_up(server))
    assert due is not None
    assert (due.event, due.failure) == (RoundEvent.FAIL, RunFailure.UPDATES_REFUSED)


def test_of_several_refusals_the_reason_is_that_of_the_first_client(tmp_path: Path) -> None:
    """By client id, whichever came first."""

    async def collect(server: ServerRun) -> Due | None:
        current, _ = await server.begin(0, 1)
        await server.answer(1, num_steps=10**9)
        await server.answer(0, **NO_EXAMPLES)
        return await server.collecting.due(current)

    with serving(tmp_path, min_clients=2) as server:
        due = asyncio.run(collect(server))
    assert due is not None
    words = "the updates of clients 0 to 1 were refused, that of client 0: num_examples is 0"
    assert words in due.reason


def test_a_round_without_refusals_fails_for_want_of_updates(tmp_path: Path) -> None:
    """At its deadline; nobody is named."""

    async def collect(server: ServerRun) -> Due | None:
        current, _ = await server.begin(0, 1)
        server.clock.now_s += 61
        return await server.collecting.due(current)

    with serving(tmp_path, min_clients=2, round_deadline=60) as server:
        due = asyncio.run(collect(server))
    assert due == Due(
        event=RoundEvent.FAIL, reason="only 0 of 2 updates were there at its deadline"
    )


@pytest.mark.parametrize(
    ("settings", "num_needed"),
    [
        ({"min_clients": 2}, 2),
        ({"min_clients": 2, "min_updates": 1}, 1),
        # Of those that were asked, however many are wanted.
        ({"min_clients": 2, "min_updates": 2, "clients_per_round": 2}, 2),
        # --require-all is about answers: an update that is excluded is an answer.
        ({"min_clients": 2, "min_updates": 1, "require_all": True}, 1),
    ],
)
def test_how_many_updates_must_be_left_after_screening(
    tmp_path: Path, settings: dict[str, Any], num_needed: int
) -> None:
    """As many as the round needed to close."""
    with serving(tmp_path, **settings) as server:
        current, _ = asyncio.run(server.begin(0, 1))
        assert server.collecting.updates_to_count(current) == num_needed


async def wait(server: ServerRun, *, tick_s: float = TICK_S) -> Due | None:
    """Wait as the round loop does."""
    return await wait_until_due(
        server.latest(),
        server.collecting,
        settings=server.settings,
        evaluations=server.evaluations,
        sessions=server.sessions,
        open_orders=server.open_orders,
        store=server.recording,
        tick_s=tick_s,
    )


def test_the_wait_ends_with_the_update_that_was_missing(tmp_path: Path) -> None:
    """It is woken: its tick is far away."""

    async def collect(server: ServerRun) -> Due | None:
        await server.begin(0)
        waiting = asyncio.create_task(wait(server, tick_s=3600))
        await server.answer(0)
        return await waiting

    with serving(tmp_path, min_clients=1) as server:
        assert asyncio.run(collect(server)) == Due(event=RoundEvent.CLOSE)


def test_late_orders_are_given_up_while_the_round_waits(tmp_path: Path) -> None:
    """The only client is silent for too long: the round fails, and the store says why."""

    async def collect(server: ServerRun) -> Due | None:
        await server.begin(0)
        await server.client_api.pull_work(server.session_ids[0], wait_s=1)
        server.clock.now_s += server.settings.stall_after + 1
        return await wait(server)

    with serving(tmp_path, min_clients=1) as server:
        due = asyncio.run(collect(server))
        assert due is not None
        assert due.event is RoundEvent.FAIL
        assert server.states(server.latest()) == {0: OrderState.ABANDONED}
        assert server.kinds_of_events()[-1] == "client-stalled"


def test_the_wait_ends_when_the_base_may_be_bad(tmp_path: Path) -> None:
    """Nothing is to rest on it: the loop looks first."""

    async def collect(server: ServerRun) -> Due | None:
        await server.begin(0)
        server.evaluations.suspect_model()
        return await wait(server)

    with serving(tmp_path, min_clients=1) as server:
        assert asyncio.run(collect(server)) is None


def test_a_verdict_names_all_clients_and_the_first_clients_reason() -> None:
    """One client has a sentence of its own."""
    assert verdict_text("refused", {3}, "bad") == "the update of client 3 was refused: bad"
    assert verdict_text("excluded", {5, 3, 4}, "too long") == (
        "the updates of clients 3 to 5 were excluded, that of client 3: too long"
    )
