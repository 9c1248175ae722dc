"""The quarantine: which payloads are kept, which are deleted, and how an update leaves it."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedrounds.errors import NotFound
from fedserver.phases import OrderEvent, OrderState
from fedserver.records import HeldState, HeldUpdate, Refusal
from fedserver.store import Store
from fedserver.updates.quarantine import QuarantineFolder
from fedserver.updates.spool import Spool
from tests.factories import begin_round, make_event, make_update, record_arrival

HELD = HeldUpdate(
    order_id="run1-r1-a1-c0-s1",
    digest="aa" * 32,
    run_id="run1",
    client_id=0,
    round_number=1,
    verdict=OrderState.REFUSED,
    state=HeldState.HELD,
    refusal=Refusal(reason="its loss is nan", evidence={}),
    kept_bytes=7,
    held_at=0.0,
)
DROPPED = replace(HELD, order_id="run1-r1-a1-c1-s1", state=HeldState.DROPPED)


def test_the_folder_takes_what_is_held_out_of_the_spool(tmp_path: Path) -> None:
    """A payload that a fenced stream left in the spool; a payload that isn't held stays there."""
    spool = Spool(tmp_path / "spool")
    folder = QuarantineFolder(tmp_path / "quarantine", max_bytes=100)
    for update in (HELD, DROPPED):
        spool.path(update.order_id, update.digest).write_bytes(b"payload")
    folder.fill([HELD, DROPPED], spool)
    assert folder.path(HELD.order_id, HELD.digest).read_bytes() == b"payload"
    assert not spool.path(HELD.order_id, HELD.digest).exists()
    assert spool.path(DROPPED.order_id, DROPPED.digest).exists()
    assert not folder.path(DROPPED.order_id, DROPPED.digest).exists()


def test_the_folder_keeps_the_files_of_held_updates_alone(tmp_path: Path) -> None:
    """Also a file that no row of the store knows is deleted."""
    folder = QuarantineFolder(tmp_path, max_bytes=100)
    for update in (HELD, DROPPED):
        folder.path(update.order_id, update.digest).write_bytes(b"payload")
    (tmp_path / "unknown").touch()
    folder.tidy([HELD, DROPPED])
    assert list(tmp_path.iterdir()) == [folder.path(HELD.order_id, HELD.digest)]
    for _ in range(2):
        folder.drop(HELD)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("max_bytes", "num_evicted"), [(14, 0), (13, 1), (7, 1), (6, 2), (0, 2)])
def test_the_oldest_payloads_make_room(tmp_path: Path, max_bytes: int, num_evicted: int) -> None:
    """Two payloads of 7 bytes are held, the first of these is older; nothing else takes room."""
    folder = QuarantineFolder(tmp_path, max_bytes=max_bytes)
    empty = replace(HELD, order_id="run1-r1-a1-c2-s1", kept_bytes=0)
    newest = replace(HELD, order_id="run1-r1-a1-c3-s1")
    excess = folder.excess([HELD, DROPPED, empty, newest])
    assert excess == [HELD, newest][:num_evicted]


def test_an_update_leaves_the_quarantine_once(tmp_path: Path) -> None:
    """A released update's client is active again; a dropped update's client stays suspended."""
    store = Store(tmp_path / "federation.sqlite")
    run, opened = begin_round(store)
    for order in opened.orders:
        record_arrival(
            store, run, make_update(order.order_id), OrderEvent.REFUSE, reason="its loss is nan"
        )
    first, second = store.quarantine.held_updates(run.run_id)
    assert store.quarantine.find_held(first.order_id) == first
    assert set(store.quarantine.suspensions(run.run_id)) == {0, 1}
    assert store.quarantine.free_held(first, HeldState.RELEASED, make_event("update-released"))
    assert store.quarantine.free_held(second, HeldState.DROPPED, make_event("update-dropped"))
    store.database.take_recorded()
    assert not store.quarantine.free_held(first, HeldState.DROPPED, make_event("update-dropped"))
    assert not store.database.take_recorded()
    states = [held.state for held in store.quarantine.held_updates(run.run_id)]
    assert states == [HeldState.RELEASED, HeldState.DROPPED]
    assert set(store.quarantine.suspensions(run.run_id)) == {1}
    assert store.quarantine.held_updates("another run") == []
    with pytest.raises(NotFound, match="no update of an order 'unknown' is in quarantine"):
        store.quarantine.find_held("unknown")
    store.close()
