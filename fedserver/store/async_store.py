"""The store's methods, awaited by the event loop; what they record is published."""

from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from fedserver.records import Event
from fedserver.runtime import Threads
from fedserver.store.store import Store

P = ParamSpec("P")
R = TypeVar("R")


def _awaited(
    method: Callable[Concatenate[Store, P], R],
) -> Callable[Concatenate["AsyncStore", P], Coroutine[Any, Any, R]]:
    """Return a store's method as a coroutine method; see `AsyncStore`."""

    async def call(self: "AsyncStore", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._call(partial(method, self._store, *args, **kwargs))

    return call


class AsyncStore:
    """Calls a store on a thread of its own, one call after another in order.

    A call returns when what it wrote is durable and the events that it recorded are published.
    Each method has the arguments, the result and the errors of the store's method of that name.
    """

    def __init__(self, store: Store, *, threads: Threads, publish: Callable[[Event], None]) -> None:
        self._store = store
        self._threads = threads
        self._publish = publish

    end_run = _awaited(Store.end_run)
    save_session = _awaited(Store.save_session)
    remove_session = _awaited(Store.remove_session)
    shorten_log = _awaited(Store.shorten_log)

    latest_round = _awaited(Store.latest_round)
    phases_of = _awaited(Store.phases_of)
    last_done_round = _awaited(Store.last_done_round)
    regressed_round = _awaited(Store.regressed_round)
    unevaluated_rounds = _awaited(Store.unevaluated_rounds)
    good_evaluations = _awaited(Store.good_evaluations)
    models_let_go = _awaited(Store.models_let_go)
    carried_over = _awaited(Store.carried_over)
    open_round = _awaited(Store.open_round)
    add_orders = _awaited(Store.add_orders)
    close_round = _awaited(Store.close_round)
    fail_round = _awaited(Store.fail_round)
    finish_round = _awaited(Store.finish_round)
    roll_back = _awaited(Store.roll_back)
    record_evaluation = _awaited(Store.record_evaluation)

    find_order = _awaited(Store.find_order)
    find_order_end = _awaited(Store.find_order_end)
    end_order = _awaited(Store.end_order)
    abandon_order = _awaited(Store.abandon_order)
    last_counted_orders = _awaited(Store.last_counted_orders)
    participation = _awaited(Store.participation)
    stored_updates = _awaited(Store.stored_updates)
    counted_updates = _awaited(Store.counted_updates)
    updates_to_keep = _awaited(Store.updates_to_keep)
    answers = _awaited(Store.answers)
    best_model = _awaited(Store.best_model)
    last_failure = _awaited(Store.last_failure)
    add_events = _awaited(Store.add_events)

    held_updates = _awaited(Store.held_updates)
    free_held = _awaited(Store.free_held)
    suspensions = _awaited(Store.suspensions)
    trusted_clients = _awaited(Store.trusted_clients)

    async def add_heard_events(self, run_id: str, events: Sequence[Event]) -> None:
        """Record events that were published before: when they happened, nothing could be written.

        Raises:
            OutOfSpace: nothing can be written yet.
        """
        await self._threads.in_store(self._record(partial(self._store.add_events, run_id, events)))

    async def _call(self, call: Callable[[], R]) -> R:
        result, recorded = await self._threads.in_store(self._record(call))
        for event in recorded:
            self._publish(event)
        return result

    def _record(self, call: Callable[[], R]) -> Callable[[], tuple[R, list[Event]]]:
        return lambda: (call(), self._store.take_recorded())
