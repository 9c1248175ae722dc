"""How an attempt opens: with clients enough and room enough, and with its adjustments."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedrounds.types import RunFailure
from fedserver.phases import Phase
from fedserver.records import NO_ADJUSTMENTS
from tests.server_run import ServerRun, serving

SETTINGS: dict[str, Any] = {"min_clients": 2, "min_updates": 1}


def test_a_round_opens_when_the_last_client_that_is_needed_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then the log says who is here, and who has gone again."""
    logger = logging.getLogger("fedserver.rounds.opening")
    caplog.set_level(logging.INFO, logger=logger.name)

    async def come_and_go(server: ServerRun) -> None:
        logged = asyncio.Semaphore(0)

        def note(_: logging.LogRecord) -> bool:
            logged.release()
            return True

        logger.addFilter(note)
        opening = asyncio.create_task(server.resume())
        await asyncio.wait_for(logged.acquire(), 60)
        await server.register(7)
        await asyncio.wait_for(logged.acquire(), 60)
        assert server.open_orders.clients_here == 1
        server.sessions.leave([7])
        await asyncio.wait_for(logged.acquire(), 60)
        logger.removeFilter(note)
        await server.register(0, 1)
        opened, _ = await opening
        assert opened.cohort == (0, 1)
        assert server.open_orders.clients_here is None

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(come_and_go(server))
    assert caplog.messages == [
        "waiting for clients: 0 of 2 are here",
        "waiting for clients: 1 of 2 are here",
        "waiting for clients: 0 of 2 are here; gone: client 7",
    ]


def test_no_round_opens_while_the_disk_is_low(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does as soon as there is room, whoever waits."""

    async def wait(server: ServerRun) -> None:
        await server.register(0, 1)
        server.disk._min_free_bytes = 1 << 60
        num_looks, note_room = 0, server.disk.note_room

        async def look() -> None:
            nonlocal num_looks
            num_looks += 1
            if num_looks == 3:
                # Twice by now the opener has decided against a round.
                assert server.store.rounds.latest_attempt(server.run.run_id) is None
                server.disk._min_free_bytes = 0
            await note_room()

        monkeypatch.setattr(server.disk, "note_room", look)
        await server.resume()
        assert num_looks == 3
        assert server.kinds_of_events() == ["disk-low", "disk-recovered", "round-opened"]

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(wait(server))


def test_the_attempt_after_one_that_failed_has_its_adjustments(tmp_path: Path) -> None:
    """The same base, a lower rate: each order says so."""

    async def open_next(server: ServerRun) -> None:
        current, base = await server.begin(0, 1)
        failed = await server.closer.fail(
            current, "why", failure=RunFailure.NOT_AGGREGATED, is_model_bad=True
        )
        opened, same = await server.opener.open_next(failed, base, attempt=2)
        assert (opened.round_number, opened.attempt, opened.phase) == (1, 2, Phase.COLLECTING)
        assert same == base
        assert server.order_of(0).training.lr == server.settings.lr / 2
        assert server.latest() == opened

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(open_next(server))


def test_a_first_model_that_is_drawn_anew_is_the_base(tmp_path: Path) -> None:
    """Clients agreed that the first model was bad."""

    async def open_next(server: ServerRun) -> None:
        current, base = await server.begin(0, 1)
        failed = await server.closer.fail(current, "why", failure=RunFailure.TOO_FEW_UPDATES)
        failed = replace(failed, adjustments_after=replace(NO_ADJUSTMENTS, num_redraws=1))
        opened, other = await server.opener.open_next(failed, base, attempt=2)
        assert other.digest != base.digest
        assert opened.base_digest == other.digest

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(open_next(server))


def test_a_cohort_that_rests_on_the_past_is_chosen_by_it(tmp_path: Path) -> None:
    """Round-robin: client 0 was asked in round 1, so client 1 is in round 2."""

    async def play(server: ServerRun) -> None:
        current, base = await server.begin(0, 1)
        (first,) = current.cohort
        await server.answer(first)
        following, _ = await server.closer.finish(await server.closer.close(current), base)
        await server.evaluations.done()
        assert following.cohort == (1 - first,)

    with serving(
        tmp_path, cohort="round-robin", clients_per_round=1, min_clients=2, min_updates=1
    ) as server:
        asyncio.run(play(server))
