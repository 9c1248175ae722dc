"""All the SQL of the service: tables, transitions in one transaction each, the history's reads."""

from fedserver.store.history import read_history, read_rounds
from fedserver.store.store import AsyncStore, Store

__all__ = ["AsyncStore", "Store", "read_history", "read_rounds"]
