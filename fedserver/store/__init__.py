"""The store: all the SQL of the service. Each method of it is one transaction."""

from fedserver.store.history import read_history, read_rounds
from fedserver.store.store import AsyncStore, Store

__all__ = ["AsyncStore", "Store", "read_history", "read_rounds"]
