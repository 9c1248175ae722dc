"""The event loop's store: what a call records is published once, in order, if it is kept."""

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fedserver.phases import ForbiddenTransition
from fedserver.records import Event
from fedserver.runtime import Threads
from fedserver.store import AsyncStore, Store
from tests.factories import begin_round, make_event, make_round

T = TypeVar("T")


class Scene:
    """A store of a run whose first round collects, and the kinds of the events published."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "federation.sqlite")
        self.run, self.opened = begin_round(self.store)
        self.store.database.take_recorded()
        self.published: list[str] = []
        self.threads = Threads()
        self.awaited = AsyncStore(self.store, threads=self.threads, publish=self._hear)

    def _hear(self, event: Event) -> None:
        self.published.append(event.kind)

    def close(self) -> None:
        """End the threads and give the connections back."""
        self.threads.close()
        self.store.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Give a store with listeners."""
    made = Scene(tmp_path)
    yield made
    made.close()


def finished(call: Coroutine[Any, Any, T]) -> T:
    """Return what a call returns."""
    return asyncio.run(call)


def test_what_a_call_records_is_published_in_its_order(scene: Scene) -> None:
    """Also what the store's own rules add, here an order that has become too stale."""
    finished(
        scene.awaited.rounds.close_round(scene.opened, make_event("closed"), carries_over=True)
    )
    following = make_round(scene.run.run_id, round_number=2)
    finished(
        scene.awaited.rounds.finish_round(
            scene.opened,
            model_digest="cd" * 32,
            next_round=following,
            stale_before=2,
            events=[make_event("done"), make_event("opened")],
        )
    )
    assert scene.published == ["closed", "done", "order-stale", "order-stale", "opened"]


def test_a_call_returns_what_the_stores_method_returns(scene: Scene) -> None:
    """Reads publish nothing."""
    assert finished(scene.awaited.rounds.latest_attempt(scene.run.run_id)) == scene.opened
    assert not scene.published


def test_what_is_rolled_back_is_not_published(scene: Scene) -> None:
    """A transition that isn't allowed leaves neither a row nor an event."""
    finished(scene.awaited.rounds.close_round(scene.opened, make_event("closed")))
    with pytest.raises(ForbiddenTransition):
        finished(scene.awaited.rounds.close_round(scene.opened, make_event("closed again")))
    finished(scene.awaited.events.add_events(scene.run.run_id, [make_event("after")]))
    assert scene.published == ["closed", "after"]


def test_a_report_that_is_known_is_not_published_again(scene: Scene) -> None:
    """A client repeats a report that it got no answer to."""
    for _ in range(2):
        report = scene.awaited.events.add_events(
            scene.run.run_id, [make_event("nan")], report_key="o#1"
        )
        finished(report)
    assert scene.published == ["nan"]


def test_events_heard_before_are_recorded_without_a_second_word(scene: Scene) -> None:
    """Listeners heard of them when nothing could be written."""
    finished(scene.awaited.add_heard_events(scene.run.run_id, [make_event("disk-full")]))
    finished(scene.awaited.events.add_events(scene.run.run_id, [make_event("disk-recovered")]))
    assert scene.published == ["disk-recovered"]
