"""Which order of each client counted last: as the store has it, with and without stored updates."""

import asyncio
from pathlib import Path

import pytest

from fedserver.rounds.last_counted import LastCounted
from fedserver.runtime import Threads
from fedserver.store import AsyncStore, Store
from tests.factories import begin_round, make_event, make_update, record_arrival


@pytest.mark.parametrize("counts_stored", [False, True])
def test_a_stored_order_counts_where_nobody_waits_for_the_round(
    tmp_path: Path, counts_stored: bool
) -> None:
    """In a synchronous run it counts when its round is done."""
    store, threads = Store(tmp_path / "federation.sqlite"), Threads()
    try:
        run, opened = begin_round(store, clients=(0, 1))
        order_id = opened.orders[1].order_id
        record_arrival(store, run, make_update(order_id))
        last_counted = LastCounted(
            AsyncStore(store, threads=threads, publish=lambda _: None),
            run.run_id,
            counts_stored=counts_stored,
        )
        asyncio.run(last_counted.read())
        assert last_counted.order_ids == ({1: order_id} if counts_stored else {})
        store.rounds.close_round(opened, make_event("round-closed"))
        store.rounds.finish_round(
            opened, model_digest="ee" * 32, next_round=None, events=[make_event("round-done")]
        )
        asyncio.run(last_counted.read())
        assert last_counted.order_ids == {1: order_id}
        last_counted.note([(1, "first"), (0, "other"), (1, "second")])
        assert last_counted.order_ids == {0: "other", 1: "second"}
        asyncio.run(last_counted.read())
        assert last_counted.order_ids == {1: order_id}
    finally:
        threads.close()
        store.close()
