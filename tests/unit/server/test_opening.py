"""Further orders of an asynchronous round, while clients come and go."""

import asyncio
from pathlib import Path

from fedrounds.strategies.registry import find_strategy
from fedrounds.tensors.entries import entry_kinds
from fedserver.api.downloads import Downloads
from fedserver.clients.sessions import Sessions
from fedserver.events import EventBus
from fedserver.housekeeping.disk import DiskWatch
from fedserver.models.checkpoints import Checkpoints
from fedserver.rounds.open_orders import OpenOrders
from fedserver.rounds.opening import Opener
from fedserver.run_context import RunContext
from fedserver.runtime import ServingClock, Threads
from fedserver.settings import ServerSettings
from fedserver.store import AsyncStore, Store
from tests.factories import make_event, make_limits, make_order, make_registration, make_round
from tests.tiny_task import tiny


def make_opener(
    folder: Path, threads: Threads, store: Store
) -> tuple[Opener, Sessions, OpenOrders]:
    """Return what opens the rounds of an asynchronous run whose first round collects."""
    settings = ServerSettings(
        task="tests.tiny_task:tiny", strategy="fedbuff", min_free_bytes=0, state_dir=folder
    )
    model = tiny.build_model()
    kinds = entry_kinds(model)
    run = store.begin_run(settings.run_settings())
    clock, bus = ServingClock(), EventBus()
    open_orders, checkpoints = OpenOrders(clock), Checkpoints(folder / "models", kinds)
    base = checkpoints.save_initial(model.state_dict())
    opened = make_round(run.run_id, clients=(0,), base_digest=base.digest)
    store.open_round(opened, make_event("round-opened"))
    order = make_order(opened.orders[0].order_id)
    open_orders.open_round(opened, base=base, limits=make_limits(), orders=[order])
    context = RunContext(
        settings=settings,
        run=run,
        kinds=kinds,
        ties={},
        modules=set(),
        strategy=find_strategy(settings.run_settings()),
    )
    recording = AsyncStore(store, threads=threads, publish=bus.publish)
    sessions = Sessions([], lease_s=60, max_num_examples=1000)
    opener = Opener(
        context,
        tiny,
        tick_s=1,
        sessions=sessions,
        open_orders=open_orders,
        store=recording,
        checkpoints=checkpoints,
        downloads=Downloads(checkpoints, threads, idle_s=60),
        disk=DiskWatch(
            folder,
            min_free_bytes=0,
            run_id=run.run_id,
            store=recording,
            bus=bus,
            open_orders=open_orders,
        ),
        threads=threads,
    )
    return opener, sessions, open_orders


def test_a_client_that_comes_back_without_its_data_sizes_meanwhile_isnt_asked(
    tmp_path: Path,
) -> None:
    """While the store is asked, a process that served two clients is there again with one."""
    threads, store = Threads(), Store(tmp_path / "federation.sqlite")

    async def give_more() -> set[int]:
        opener, sessions, open_orders = make_opener(tmp_path, threads, store)
        sessions.register(make_registration(1, 2, num_examples=(10, 10)))
        sessions.register(make_registration(3, instance_key="three", num_examples=(10,)))

        async def come_back() -> None:
            sessions.register(make_registration(1))

        # The second one runs when the first one waits for the first time.
        await asyncio.gather(opener.give_more(), come_back())
        return {one.order.client_id for one in open_orders.list_open()}

    try:
        assert asyncio.run(give_more()) == {0, 3}
    finally:
        threads.close()
        store.close()
