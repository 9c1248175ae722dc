"""Whether the disk has room for another round, and what is told of it.

What happened while nothing could be written is recorded, with its time, once there is room.
"""

import logging
import shutil
import time
from pathlib import Path

from fedserver.events import EventBus, event_of
from fedserver.orderbook import OrderBook
from fedserver.records import Event
from fedserver.store import Store
from fedserver.workers import Workers
from shared.errors import OutOfSpace
from shared.types import IncidentKind

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
        store: Store,
        workers: Workers,
        bus: EventBus,
        book: OrderBook,
    ) -> None:
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        self._run_id = run_id
        self._store = store
        self._workers = workers
        self._bus = bus
        self._book = book
        self._was_low = False
        self._full_at: float | None = None
        self._unrecorded: list[Event] = []

    def is_low(self) -> bool:
        """Whether less is free than a new round may begin with."""
        return self._free_bytes() < self._min_free_bytes

    async def tell(self) -> None:
        """Record that the disk has become low, or that it isn't any more."""
        is_low = self.is_low()
        if is_low != self._was_low:
            self._was_low = is_low
            await self._record(
                event_of(
                    IncidentKind.DISK_LOW if is_low else "disk-recovered",
                    self._book.latest,
                    is_incident=is_low,
                    free_bytes=self._free_bytes(),
                    min_free_bytes=self._min_free_bytes,
                )
            )

    async def note_full(self, error: OutOfSpace) -> None:
        """Record that something couldn't be written; once a minute is enough."""
        now = time.monotonic()
        if self._full_at is None or now - self._full_at > _QUIET_S:
            self._full_at = now
            logger.warning("%s, and work goes on by itself", error)
            await self._record(
                event_of(
                    IncidentKind.DISK_FULL,
                    self._book.latest,
                    is_incident=True,
                    free_bytes=self._free_bytes(),
                )
            )

    async def _record(self, happened: Event) -> None:
        self._bus.publish(happened)
        self._unrecorded.append(happened)
        try:
            await self._workers.in_store(self._store.add_events, self._run_id, self._unrecorded)
        except OutOfSpace:
            return
        self._unrecorded = []

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._folder).free
