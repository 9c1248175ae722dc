"""The way back from a bad model."""

import asyncio
from pathlib import Path
from typing import Any

from fedserver.models.evaluation import may_be_repeated
from fedserver.phases import Phase
from fedserver.rounds.rollback import roll_back
from tests.server_run import ServerRun, serving

SETTINGS: dict[str, Any] = {"min_clients": 2, "min_updates": 1}


def test_a_model_taken_back_takes_the_round_on_it_along(tmp_path: Path) -> None:
    """Its attempt ends ABANDONED, in the store and in memory; both are incidents."""

    async def take_back(server: ServerRun) -> None:
        done, current = await server.finish_first_round(0, 1)
        server.events.clear()
        await roll_back(
            done,
            current,
            max_adjustments=3,
            store=server.recording,
            open_orders=server.open_orders,
        )
        phases = [server.store.rounds.phases_of(server.run.run_id, number) for number in (1, 2)]
        assert phases == [[Phase.ROLLED_BACK], [Phase.ABANDONED]]
        assert server.open_orders.list_all() == []
        taken_back, abandoned = server.events
        assert (taken_back.kind, taken_back.fields["to"]) == ("model-rolled-back", done.base_digest)
        assert taken_back.fields["change"] == "rate times 0.5, norm band times 0.5"
        assert (abandoned.kind, abandoned.round_number) == ("round-abandoned", 2)
        assert server.latest().adjustments_after.lr_factor == 0.5

    with serving(tmp_path, **SETTINGS) as server:
        asyncio.run(take_back(server))


def test_a_last_round_is_taken_back_alone(tmp_path: Path) -> None:
    """No round goes on with its model. With --max-adjustments 0 nothing is changed."""

    async def take_back(server: ServerRun) -> None:
        opened, base = await server.begin(0, 1)
        await server.answer(0)
        done, _ = await server.closer.finish(await server.closer.close(opened), base)
        await server.evaluations.done()
        server.events.clear()
        await roll_back(
            done, done, max_adjustments=0, store=server.recording, open_orders=server.open_orders
        )
        (taken_back,) = server.events
        assert taken_back.fields["change"] is None

    with serving(tmp_path, rounds=1, **SETTINGS) as server:
        asyncio.run(take_back(server))


def test_each_round_may_be_repeated_as_often_as_any_other(tmp_path: Path) -> None:
    """--max-rollbacks counts the repetitions of each round by itself."""

    async def take_back(server: ServerRun) -> list[bool]:
        first, second = await server.finish_first_round(0, 1)
        await roll_back(
            first,
            second,
            max_adjustments=0,
            store=server.recording,
            open_orders=server.open_orders,
        )
        return [
            await may_be_repeated(bad, store=server.recording, max_rollbacks=1)
            for bad in (first, second)
        ]

    with serving(tmp_path, **SETTINGS) as server:
        assert asyncio.run(take_back(server)) == [False, True]
