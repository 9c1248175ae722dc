"""Whether the disk has room for another round, and the record of the server's failures.

Events of a time in which nothing could be written are recorded, with that time, once there is room.
"""

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

from fedrounds.errors import FederationError, OutOfFiles, OutOfSpace, StorageUnusable
from fedrounds.escaping import printable
from fedrounds.types import IncidentKind
from fedserver.clients.open_orders import OpenOrders
from fedserver.events import EventBus, event_of
from fedserver.records import Event
from fedserver.store import AsyncStore

logger = logging.getLogger(__name__)

_QUIET_S = 60.0


class DiskWatch:
    """Watches the disk of one folder for one run."""

    def __init__(
        self,
        folder: Path,
        *,
        min_free_bytes: int,
        run_id: str,
        store: AsyncStore,
        bus: EventBus,
        open_orders: OpenOrders,
    ) -> None:
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        self._run_id = run_id
        self._store = store
        self._bus = bus
        self._open_orders = open_orders
        self._was_low = False
        self._noted_at: dict[str, float] = {}
        self._unrecorded: list[Event] = []

    def is_low(self) -> bool:
        """Whether less is free than a new round may begin with."""
        return self._free_bytes() < self._min_free_bytes

    async def note_room(self) -> None:
        """Record that the disk has become low, or isn't low any more."""
        is_low = self.is_low()
        if is_low != self._was_low:
            self._was_low = is_low
            if is_low:
                logger.warning(
                    "no round opens: the disk of %s has %d bytes free, and --min-free-bytes is %d; "
                    "free some space, or start again with a smaller --min-free-bytes",
                    *(self._folder, self._free_bytes(), self._min_free_bytes),
                )
            await self.record(
                event_of(
                    IncidentKind.DISK_LOW if is_low else "disk-recovered",
                    self._open_orders.latest,
                    is_incident=is_low,
                    free_bytes=self._free_bytes(),
                    min_free_bytes=self._min_free_bytes,
                )
            )

    async def note_failure(self, what: str, error: Exception) -> None:
        """Record that `what` (a call, or the round loop) failed for no fault of a client.

        Once a minute for each kind of failure is enough.
        """
        fields: dict[str, Any] = {}
        if isinstance(error, OutOfFiles):
            kind = IncidentKind.OUT_OF_FILES
        elif isinstance(error, OutOfSpace):
            kind, fields = IncidentKind.DISK_FULL, {"free_bytes": self._free_bytes()}
        else:
            kind, fields = IncidentKind.SERVER_FAILED, _failure(what, error)
        key, now = f"{kind} {fields.get('what')}", time.monotonic()
        if now - self._noted_at.get(key, -math.inf) < _QUIET_S:
            return
        self._noted_at[key] = now
        if isinstance(error, StorageUnusable):
            logger.error("%s", error)
        elif isinstance(error, FederationError):
            logger.warning("%s, and work goes on by itself", error)
        elif isinstance(error, OSError):
            logger.warning("%s failed: %s; it is tried again", what, error)
        else:
            logger.error("%s failed in a way that isn't foreseen", what, exc_info=error)
        await self.record(event_of(kind, self._open_orders.latest, is_incident=True, **fields))

    async def note_end(self, what: str, error: FederationError) -> None:
        """Record that the server ends because `what` failed with this error."""
        fields = _failure(what, error)
        latest = self._open_orders.latest
        await self.record(event_of(IncidentKind.SERVER_FAILED, latest, is_incident=True, **fields))

    async def record(self, event: Event) -> None:
        """Publish an event, and record it now or with the next event that can be recorded."""
        self._bus.publish(event)
        self._unrecorded.append(event)
        try:
            await self._store.add_heard_events(self._run_id, self._unrecorded)
        except FederationError:
            # It is the disk or the database that fails.
            return
        self._unrecorded = []

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._folder).free


def _failure(what: str, error: Exception) -> dict[str, Any]:
    return {"what": what, "reason": printable(f"{type(error).__name__}: {error}")}
