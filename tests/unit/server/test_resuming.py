"""Where a killed run goes on: the store and the folders are all that the next start has."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from fedrounds.errors import StorageDamaged
from fedrounds.types import Receipt, RunFailure
from fedserver.phases import Phase, RoundEvent
from fedserver.records import HeldState
from tests.server_run import ServerRun, serving

SETTINGS: dict[str, Any] = {"min_clients": 2, "min_updates": 1}


def before_a_kill(folder: Path, begin: Callable[[ServerRun], Coroutine[Any, Any, None]]) -> None:
    """Let a server do this, and leave everything as it is then."""
    with serving(folder, **SETTINGS) as server:
        asyncio.run(server.begin(0, 1))
        asyncio.run(begin(server))


async def answer_of_0(server: ServerRun) -> None:
    """Let client 0's update be stored."""
    await server.answer(0)


async def close(server: ServerRun) -> None:
    """Let client 0's update be stored, and close the round."""
    await server.answer(0)
    await server.closer.close(server.latest())


async def finish(server: ServerRun) -> None:
    """Let a round of client 0's update be done; the next one is open."""
    await server.answer(0)
    closed = await server.closer.close(server.latest())
    base = server.checkpoints.load(closed.base_digest)
    await server.closer.finish(closed, base)
    await server.evaluations.done()


def test_a_round_that_collected_goes_on_with_what_was_stored(tmp_path: Path) -> None:
    """The update that was acknowledged counts; the open order is handed out again."""
    before_a_kill(tmp_path, answer_of_0)
    with serving(tmp_path, **SETTINGS) as server:

        async def go_on() -> None:
            current, base = await server.resume()
            assert (current.phase, current.attempt) == (Phase.COLLECTING, 1)
            assert base.digest == current.base_digest
            server.session_ids[1] = await server.register(1)
            assert await server.collecting.due(current) is None
            assert (await server.answer(1)).receipt is Receipt.STORED
            due = await server.collecting.due(current)
            assert due is not None
            assert due.event is RoundEvent.CLOSE

        asyncio.run(go_on())


def test_a_round_that_was_closed_is_finished(tmp_path: Path) -> None:
    """With the updates that were in it; nothing is handed out."""
    before_a_kill(tmp_path, close)
    with serving(tmp_path, **SETTINGS) as server:

        async def go_on() -> None:
            closed, base = await server.go_on()
            assert closed.phase is Phase.AGGREGATING
            assert server.open_orders.list_all() == []
            await server.closer.finish(closed, base)
            assert server.states(closed) == {0: "COUNTED", 1: "LATE"}
            await server.evaluations.done()

        asyncio.run(go_on())


def test_a_round_that_was_opened_begins_with_the_model_that_was_made(tmp_path: Path) -> None:
    """Its orders name the orders that counted."""
    before_a_kill(tmp_path, finish)
    with serving(tmp_path, **SETTINGS) as server:
        current, base = asyncio.run(server.resume())
        assert (current.round_number, current.phase) == (2, Phase.COLLECTING)
        done = server.store.rounds.last_done_round(server.run.run_id)
        assert done is not None
        assert base.digest == done.model_digest
        order_id = done.orders[0].order_id
        assert server.order_of(0).last_counted_order_id == order_id
        # A bad model may have been recorded and not taken back.
        assert server.evaluations.has_news


def test_a_model_without_its_evaluation_is_evaluated(tmp_path: Path) -> None:
    """The kill came before its numbers were recorded."""

    async def finish_unevaluated(server: ServerRun) -> None:
        await server.answer(0)
        closed = await server.closer.close(server.latest())
        server.evaluations._evaluator.stop()
        await server.closer.finish(closed, server.checkpoints.load(closed.base_digest))
        await server.evaluations.done()

    before_a_kill(tmp_path, finish_unevaluated)
    with serving(tmp_path, **SETTINGS) as server:
        (unevaluated,) = server.store.rounds.unevaluated_rounds(server.run.run_id)
        assert unevaluated.round_number == 1

        async def go_on() -> None:
            await server.resume()
            await server.evaluations.done()

        asyncio.run(go_on())
        assert server.store.rounds.unevaluated_rounds(server.run.run_id) == []


def damage(folder: Path) -> None:
    """Write over an update in the spool."""
    (update,) = (folder / "spool").iterdir()
    update.write_bytes(b"other bytes")


def test_a_damaged_update_stops_the_run_before_anything_rests_on_it(tmp_path: Path) -> None:
    """The sentence says what to do; nothing is deleted."""
    before_a_kill(tmp_path, answer_of_0)
    damage(tmp_path)
    with serving(tmp_path, **SETTINGS) as server:
        with pytest.raises(StorageDamaged, match=r"the update of client 0 holds other bytes .*"):
            asyncio.run(server.resume())
        assert server.latest().phase is Phase.COLLECTING
        assert len(list((tmp_path / "spool").iterdir())) == 1


def test_a_damaged_update_is_given_up_with_its_attempt_where_that_is_allowed(
    tmp_path: Path,
) -> None:
    """--give-up-damaged: the next attempt asks the clients anew."""
    before_a_kill(tmp_path, answer_of_0)
    damage(tmp_path)
    with serving(tmp_path, give_up_damaged=True, **SETTINGS) as server:
        failed, _ = asyncio.run(server.resume())
        assert failed.phase is Phase.FAILED
        reason, failure = server.store.events.last_failure(server.run.run_id)
        assert failure is RunFailure.UPDATES_DAMAGED
        assert reason.startswith("damaged on the disk: the update of client 0 holds other bytes")


def test_files_in_quarantine_that_no_record_knows_are_deleted(tmp_path: Path) -> None:
    """And what is recorded as held, but was still in the spool, is moved there."""

    async def refuse(server: ServerRun) -> None:
        await server.answer(0, num_steps=10**9)
        (tmp_path / "quarantine" / "draft-of-a-kill").write_bytes(b"x")
        order = server.order_of(1)
        answer = await server.upload(server.session_ids[1], order, b"no safetensors")
        assert answer.receipt is Receipt.REFUSED
        held = server.store.quarantine.held_updates()[-1]
        server.quarantine.path(held.order_id, held.digest).rename(
            server.spool.path(held.order_id, held.digest)
        )

    before_a_kill(tmp_path, refuse)
    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(server.resume())
        held = server.store.quarantine.held_updates()[-1]
        assert held.state is HeldState.HELD
        assert list((tmp_path / "quarantine").iterdir()) == [
            server.quarantine.path(held.order_id, held.digest)
        ]
        assert list((tmp_path / "spool").iterdir()) == []
