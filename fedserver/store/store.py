"""The coordinator's memory: runs, sessions, rounds, orders, updates, quarantine, events, ledger.

Thread safety: any thread may call any method; writers take turns in the database, also those of
other processes.
Durability: when a writing method returns, what it wrote survives a loss of power (SQLite in WAL
mode with synchronous=FULL). Each writing method is one transaction: all of it or nothing.
Consistency: whatever depends on a phase reads it in the transaction that writes.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from fedserver.records import Event
from fedserver.runtime import Threads
from fedserver.store.database import AsyncDatabase, Database
from fedserver.store.events import Events
from fedserver.store.ledger import LedgerTable
from fedserver.store.orders import Orders
from fedserver.store.quarantine import Quarantine
from fedserver.store.rounds import Rounds
from fedserver.store.runs import Runs
from fedserver.store.transitions import add_events


class Store:
    """The tables of one state-dir; its methods block.

    Raises:
        NotFound: `read_only`, and there is no database.
        StorageUnusable: this user may not open it; even to read, SQLite writes files beside it.
        WrongSettings: a newer or much older version of this software made the database; or an
            earlier version did, and it is opened to write without `upgrades`.
        StorageDamaged: the file isn't a database, or is damaged.
    """

    def __init__(self, path: Path, *, read_only: bool = False, upgrades: bool = False) -> None:
        self.database = Database(path, read_only=read_only, upgrades=upgrades)
        self.runs = Runs(self.database)
        self.rounds = Rounds(self.database)
        self.orders = Orders(self.database)
        self.events = Events(self.database)
        self.quarantine = Quarantine(self.database)
        self.ledger = LedgerTable(self.database)

    def close(self) -> None:
        """Give the database's connections back."""
        self.database.close()


class AsyncStore:
    """The same tables, for the event loop: a method of theirs is awaited; see `AsyncDatabase`."""

    def __init__(self, store: Store, *, threads: Threads, publish: Callable[[Event], None]) -> None:
        self.database = AsyncDatabase(store.database, threads=threads, publish=publish)
        self.runs = Runs(self.database)
        self.rounds = Rounds(self.database)
        self.orders = Orders(self.database)
        self.events = Events(self.database)
        self.quarantine = Quarantine(self.database)

    async def add_heard_events(self, run_id: str, events: Iterable[Event]) -> None:
        """Record events that were published before, when nothing could be written.

        Raises:
            OutOfSpace: nothing can be written yet.
        """
        record = partial(add_events, run_id=run_id, events=events)
        await self.database.write(record, publishes=False)
