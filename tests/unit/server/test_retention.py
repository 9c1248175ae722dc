"""What finished rounds leave behind: updates, models, and what lies in quarantine."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedserver.records import HeldState
from tests.server_run import ServerRun, non_finite, serving

SETTINGS: dict[str, Any] = {"min_clients": 2, "min_updates": 1}


async def play(server: ServerRun, num_rounds: int) -> None:
    """Let client 0 answer in so many rounds."""
    current, base = await server.begin(0, 1)
    for number in range(1, num_rounds + 1):
        await server.answer(0, shift=0.01 * number)
        current, base = await server.closer.finish(await server.closer.close(current), base)
        await server.evaluations.done()


def rounds_in_spool(folder: Path) -> list[str]:
    """Return the rounds of the updates in the spool, as their order ids say."""
    return sorted(path.name.split("-")[2] for path in (folder / "spool").iterdir())


@pytest.mark.parametrize(
    ("keep_updates", "kept"), [(0, []), (2, ["r2", "r3"]), ("all", ["r1", "r2", "r3"])]
)
def test_updates_of_the_last_rounds_are_kept(
    tmp_path: Path, keep_updates: object, kept: list[str]
) -> None:
    """As many rounds as --keep-updates says."""
    with serving(tmp_path, rounds=5, keep_updates=keep_updates, **SETTINGS) as server:
        asyncio.run(play(server, 3))
        assert rounds_in_spool(tmp_path) == kept


@pytest.mark.parametrize("keep_updates", [0, "all"])
def test_what_the_open_round_needs_stays_and_what_was_never_finished_goes(
    tmp_path: Path, keep_updates: object
) -> None:
    """A stored update of the round that collects; half an update of an order that has ended."""

    async def drop(server: ServerRun) -> None:
        current, _ = await server.begin(0, 1)
        await server.answer(0)
        order = server.order_of(1)
        with server.spool.open_stream(order.order_id, "0" * 64, offset=0) as stream:
            stream.append(memoryview(b"half"))
        await server.retention.drop_updates(done_round=0)
        assert len(rounds_in_spool(tmp_path)) == 2
        closed = await server.closer.close(current)
        await server.retention.drop_updates(done_round=0)
        stored = server.store.orders.stored_updates(closed)
        assert [path.name for path in (tmp_path / "spool").iterdir()] == [
            f"{stored[0].update.order_id}.{stored[0].update.digest}"
        ]

    with serving(tmp_path, keep_updates=keep_updates, **SETTINGS) as server:
        asyncio.run(drop(server))


def test_models_of_the_last_rounds_and_the_best_model_are_kept(tmp_path: Path) -> None:
    """And a model that somebody is downloading, until a later call."""

    async def drop(server: ServerRun) -> None:
        current, base = await server.begin(0, 1)
        digests, reading = [base.digest], asyncio.Event()

        async def take_slowly(_: bytes) -> None:
            await reading.wait()

        download = asyncio.create_task(
            server.client_api.download(
                server.session_ids[1], base.digest, offset=0, write=take_slowly
            )
        )
        for number in range(1, 4):
            await server.answer(0, shift=0.01 * number)
            current, base = await server.closer.finish(await server.closer.close(current), base)
            await server.evaluations.done()
            digests.append(base.digest)
        found = server.store.rounds.best_model(server.run.run_id, server.settings.goal)
        assert found is not None
        best = found[1]
        assert server.checkpoints.digests() == {digests[0], digests[3], digests[2], best}
        reading.set()
        await download
        await server.retention.drop_models(done_round=3)
        assert server.checkpoints.digests() == {digests[3], digests[2], best}

    with serving(tmp_path, rounds=5, keep_rounds=1, **SETTINGS) as server:
        asyncio.run(drop(server))


def test_all_models_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    """--keep-rounds all: none is ever deleted."""
    with serving(tmp_path, rounds=5, keep_rounds="all", **SETTINGS) as server:
        asyncio.run(play(server, 3))
        assert len(server.checkpoints.digests()) == 4


def test_the_oldest_in_quarantine_make_room_for_the_newest(tmp_path: Path) -> None:
    """Each eviction is recorded; what a person has released or dropped is none of it."""

    async def refuse(server: ServerRun) -> None:
        await server.begin(0, 1)
        for client_id in (0, 1):
            order = server.order_of(client_id)
            payload = non_finite(server.payload_of(order, shift=0.01 * (client_id + 1)))
            await server.upload(server.session_ids[client_id], order, payload)

    with serving(tmp_path / "small", quarantine_bytes=3000, **SETTINGS) as server:
        asyncio.run(refuse(server))
        first, second = server.store.quarantine.held_updates()
        assert 1500 < first.kept_bytes < 3000
        assert (first.state, second.state) == (HeldState.EVICTED, HeldState.HELD)
        assert [path.name for path in (tmp_path / "small/quarantine").iterdir()] == [
            f"{second.order_id}.{second.digest}"
        ]
        assert server.kinds_of_events().count("quarantine-evicted") == 1
    with serving(tmp_path / "large", **SETTINGS) as server:
        asyncio.run(refuse(server))
        assert [held.state for held in server.store.quarantine.held_updates()] == [
            HeldState.HELD
        ] * 2
