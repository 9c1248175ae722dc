"""The coordinator's memory: runs, sessions, rounds, orders, updates, quarantine, events, ledger."""

from fedserver.store.ledger import LedgerTable
from fedserver.store.orders import Orders
from fedserver.store.quarantine import Quarantine
from fedserver.store.rounds import Rounds
from fedserver.store.runs import Runs


class Store(Runs, Rounds, Orders, Quarantine, LedgerTable):
    """The tables of one state-dir.

    Thread safety: any thread may call any method; writers take turns in the database, also those of
    other processes.
    Durability: when a writing method returns, what it wrote survives a loss of power (SQLite in WAL
    mode with synchronous=FULL). Each writing method is one transaction: all of it or nothing.
    Consistency: whatever depends on a phase reads it in the transaction that writes.

    Raises:
        NotFound: `read_only`, and there is no database.
        InvalidInput: this user may not open it; even to read, SQLite writes files beside it.
        WrongSettings: a newer or much older version of this software made the database, or an
            earlier one and it is opened to write without `upgrades`.
        StorageDamaged: the file isn't a database, or a damaged one.
    """
