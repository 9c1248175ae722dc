"""After a restart or an absence: what is recorded of it, and whether files are whole."""

from collections.abc import Sequence
from pathlib import Path

from fedrounds.tensors.codec import digest_file
from fedrounds.types import IncidentKind
from fedserver.clients.open_orders import OpenOrders
from fedserver.events import event_of
from fedserver.housekeeping.disk import DiskWatch
from fedserver.records import StoredUpdate
from fedserver.store import AsyncStore
from fedserver.updates.spool import Spool


async def note_restart(store: AsyncStore, run_id: str) -> None:
    """Record that the server was started again, if the run has begun."""
    latest = await store.rounds.latest_attempt(run_id)
    if latest is not None:
        restarted = event_of(IncidentKind.SERVER_RESTARTED, latest, is_incident=True)
        await store.events.add_events(run_id, [restarted])


async def note_absence(away_s: float, *, open_orders: OpenOrders, disk: DiskWatch) -> None:
    """Record that the server was away for `away_s` seconds, if the run has begun."""
    if (latest := open_orders.latest) is not None:
        away = event_of(IncidentKind.SERVER_AWAY, latest, is_incident=True, away_s=away_s)
        await disk.record(away)


def damaged_updates(spool: Spool, stored: Sequence[StoredUpdate]) -> list[str]:
    """Return a phrase for each acknowledged update whose file is gone or holds other bytes."""
    damaged = []
    for update in stored:
        path = spool.path(update.update.order_id, update.update.digest)
        if not path.exists():
            damaged.append(f"the update of client {update.client_id} is gone ({path})")
        elif digest_file(path) != update.update.digest:
            damaged.append(f"the update of client {update.client_id} holds other bytes ({path})")
    return damaged


def salvageable(models: Path) -> str:
    """Return a phrase that says which global models in the folder `models` are whole."""
    paths = sorted(models.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    whole = [path for path in paths if digest_file(path) == path.stem]
    if not whole:
        return f"no whole global model is in {models}"
    return (
        f"{len(whole)} of {len(paths)} global models in {models} are whole; the newest of them is "
        f"{whole[-1].name}, a safetensors file that can be used as it is"
    )
