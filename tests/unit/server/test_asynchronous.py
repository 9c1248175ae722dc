"""Asynchronous collecting: a buffer that is filled by further orders, while clients come and go."""

import asyncio
from pathlib import Path
from typing import Any

from fedrounds.types import Counters, Receipt, RunFailure
from fedserver.phases import OrderState, RoundEvent
from fedserver.rounds.asynchronous import AsynchronousCollecting
from tests.factories import make_registration
from tests.server_run import ServerRun, serving

FEDBUFF: dict[str, Any] = {
    "strategy": "fedbuff",
    "strategy_parameters": {"buffer_size": 2},
    "min_clients": 1,
}


async def give_up(server: ServerRun, client_id: int) -> None:
    """Let a client give up its order."""
    await server.client_api.report_progress(
        server.session_ids[client_id],
        server.order_of(client_id).order_id,
        counters=Counters(),
        incidents=[],
        gave_up=True,
    )


def test_a_client_that_comes_back_without_its_data_sizes_meanwhile_isnt_asked(
    tmp_path: Path,
) -> None:
    """While the store is asked, a process that served two clients is there again with one."""
    with serving(tmp_path, strategy="fedbuff", min_clients=1) as server:

        async def give_more() -> set[int]:
            assert isinstance(server.collecting, AsynchronousCollecting)
            server.sessions.register(make_registration(0, instance_key="zero", num_examples=(10,)))
            await server.resume()
            server.sessions.register(make_registration(1, 2, num_examples=(10, 10)))
            server.sessions.register(make_registration(3, instance_key="three", num_examples=(10,)))

            async def come_back() -> None:
                server.sessions.register(make_registration(1))

            # `come_back` runs when `give_more` waits for the first time.
            await asyncio.gather(server.collecting.give_more(), come_back())
            return {order.order.client_id for order in server.open_orders.list_open()}

        assert asyncio.run(give_more()) == {0, 3}


def test_a_client_that_answered_gets_a_further_order_until_the_buffer_is_full(
    tmp_path: Path,
) -> None:
    """One client fills a buffer of two by itself; its second order names the first."""

    async def collect(server: ServerRun) -> None:
        current, _ = await server.begin(0)
        first = server.order_of(0)
        assert await server.collecting.due(current) is None
        await server.answer(0)
        assert await server.collecting.due(current) is None
        second = server.order_of(0)
        assert second.order_id == first.order_id.replace("-s1", "-s2")
        assert second.last_counted_order_id == first.order_id
        assert second.seed != first.seed
        await server.answer(0)
        due = await server.collecting.due(current)
        assert due is not None
        assert due.event is RoundEvent.CLOSE

    with serving(tmp_path, **FEDBUFF) as server:
        asyncio.run(collect(server))


def test_no_more_clients_are_at_work_than_concurrency_says(tmp_path: Path) -> None:
    """Whoever is here beside them waits."""

    async def collect(server: ServerRun) -> None:
        current, _ = await server.begin(0, 1, 2)
        assert len(current.orders) == 2
        assert await server.collecting.due(current) is None
        assert len(server.open_orders.list_open()) == 2

    with serving(tmp_path, **FEDBUFF | {"min_clients": 3}, concurrency=2) as server:
        asyncio.run(collect(server))


def test_a_round_fails_when_nobody_is_left_who_could_fill_its_buffer(tmp_path: Path) -> None:
    """A refusal is why, if there is any: the round asks whomever it can."""

    async def collect(server: ServerRun) -> None:
        current, _ = await server.begin(0, 1)
        await give_up(server, 0)
        assert await server.collecting.due(current) is None
        await server.answer(1, num_examples=0)
        due = await server.collecting.due(current)
        assert due is not None
        assert (due.event, due.failure) == (RoundEvent.FAIL, RunFailure.UPDATES_REFUSED)
        assert due.reason.startswith(
            "0 of 2 updates are there, nobody is at work, and whoever is here has given up or sits "
            "out; the update of client 1 was refused"
        )

    with serving(tmp_path, **FEDBUFF | {"min_clients": 2}) as server:
        asyncio.run(collect(server))


def test_a_round_waits_while_nobody_is_here(tmp_path: Path) -> None:
    """Somebody may come: that its clients have left is no failure."""

    async def collect(server: ServerRun) -> None:
        current, _ = await server.begin(0)
        await give_up(server, 0)
        server.clock.now_s += server.settings.lease
        assert await server.collecting.due(current) is None

    with serving(tmp_path, **FEDBUFF) as server:
        asyncio.run(collect(server))


def test_open_orders_go_on_in_the_next_round_and_after_a_kill(tmp_path: Path) -> None:
    """The update of an order of round 1 comes into round 2, also where memory is new."""

    async def close_round_1(server: ServerRun) -> None:
        current, base = await server.begin(0, 1, 2)
        for client_id in (0, 1):
            await server.answer(client_id)
        closed = await server.closer.close(current)
        assert [order.order.client_id for order in server.open_orders.list_open()] == [2]
        following, _ = await server.closer.finish(closed, base)
        assert [order.client_id for order in following.orders] == [0, 1]
        assert server.order_of(2).order_id == current.orders[2].order_id
        await server.evaluations.done()

    async def close_round_2(server: ServerRun) -> None:
        current, base = await server.resume()
        carried = server.order_of(2)
        assert (current.round_number, carried.round_number) == (2, 1)
        assert carried.sections[0].digest != base.digest
        for client_id in (2, 0):
            server.session_ids[client_id] = await server.register(client_id)
            assert (await server.answer(client_id)).receipt is Receipt.STORED
        closed = await server.closer.close(current)
        stored = server.store.orders.stored_updates(closed)
        assert [(update.client_id, update.staleness) for update in stored] == [(0, 0), (2, 1)]

    with serving(tmp_path, **FEDBUFF | {"min_clients": 3}) as server:
        asyncio.run(close_round_1(server))
    with serving(tmp_path, **FEDBUFF | {"min_clients": 3}) as server:
        asyncio.run(close_round_2(server))


def test_one_update_that_is_left_makes_a_round(tmp_path: Path) -> None:
    """Whatever --min-clients says of a synchronous one."""
    with serving(tmp_path, **FEDBUFF) as server:
        current, _ = asyncio.run(server.begin(0))
        assert server.collecting.updates_to_count(current) == 1


def test_a_full_disk_gives_no_further_orders_and_fails_no_round(tmp_path: Path) -> None:
    """Whether the disk is full before or fills while the store is asked; with room it goes on."""

    async def collect(server: ServerRun) -> None:
        current, _ = await server.begin(0)
        await server.answer(0)
        assert isinstance(server.collecting, AsynchronousCollecting)

        async def fill() -> None:
            server.disk._min_free_bytes = 1 << 60

        # `fill` runs when `give_more` waits for the store for the first time.
        can_go_on, _ = await asyncio.gather(server.collecting.give_more(), fill())
        assert can_go_on
        assert await server.collecting.due(current) is None
        assert len(server.latest().orders) == 1
        server.disk._min_free_bytes = 0
        assert await server.collecting.due(current) is None
        assert server.order_of(0).order_id == current.orders[0].order_id.replace("-s1", "-s2")

    with serving(tmp_path, **FEDBUFF) as server:
        asyncio.run(collect(server))


def test_a_suspended_client_gets_no_further_order(tmp_path: Path) -> None:
    """It is here and idle; client 0 goes on without it."""

    async def collect(server: ServerRun) -> None:
        current, base = await server.begin(0, 1)
        assert (await server.answer(1, num_examples=0)).receipt is Receipt.REFUSED
        await server.answer(0)
        following, _ = await server.closer.finish(await server.closer.close(current), base)
        await server.evaluations.done()
        assert following.cohort == (0,)
        assert await server.collecting.due(following) is None
        assert [order.order.client_id for order in server.open_orders.list_open()] == [0]

    settings = FEDBUFF | {"strategy_parameters": {"buffer_size": 1}}
    with serving(tmp_path, **settings) as server:
        asyncio.run(collect(server))


def test_an_excluded_update_counts_for_nothing_in_its_clients_next_order(tmp_path: Path) -> None:
    """It was taken to count from the close of its round until it was screened."""

    async def finish(server: ServerRun) -> None:
        current, base = await server.begin(0, 1, 2, 3, 4)
        for client_id in range(5):
            await server.answer(client_id, shift=3.0 if client_id == 4 else 0.001)
        closed = await server.closer.close(current)
        assert sorted(server.last_counted.order_ids) == [0, 1, 2, 3, 4]
        await server.closer.finish(closed, base)
        assert server.states(closed)[4] == OrderState.EXCLUDED
        # A buffer of five needs all five clients: client 4 doesn't sit out.
        counted = [server.order_of(client_id).last_counted_order_id for client_id in range(5)]
        assert counted == [*(order.order_id for order in closed.orders[:4]), ""]
        await server.evaluations.done()

    settings = FEDBUFF | {"strategy_parameters": {"buffer_size": 5}, "min_clients": 5}
    with serving(tmp_path, **settings, norm_band=3) as server:
        asyncio.run(finish(server))


def test_an_update_of_an_attempt_that_failed_counts_for_nothing(tmp_path: Path) -> None:
    """Its client's next order doesn't name it."""

    async def fail(server: ServerRun) -> None:
        current, base = await server.begin(0)
        await server.answer(0)
        await server.collecting.due(current)
        assert list(server.last_counted.order_ids) == [0]
        failed = await server.closer.fail(current, "why", failure=RunFailure.TOO_FEW_UPDATES)
        assert server.last_counted.order_ids == {}
        await server.opener.open_next(failed, base, attempt=2)
        assert server.order_of(0).last_counted_order_id == ""

    with serving(tmp_path, **FEDBUFF) as server:
        asyncio.run(fail(server))
