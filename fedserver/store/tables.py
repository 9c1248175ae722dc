"""How the store's methods run: each in one transaction, at once or awaited.

A component of the store (`Orders`, `Rounds`, ...) is written once. Its methods say with `@reads` or
`@writes` which kind of transaction they run in, and get its connection. Over a `Database` they
return their result; over an `AsyncDatabase` they return a coroutine, which the event loop awaits.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from sqlalchemy import Connection

from fedserver.store.database import AsyncDatabase, Database

D_co = TypeVar("D_co", bound=Database | AsyncDatabase, covariant=True)
P = ParamSpec("P")
R = TypeVar("R")


class Tables(Generic[D_co]):
    """Methods for some tables of a database."""

    def __init__(self, database: D_co) -> None:
        self._database = database


class _Method(Generic[P, R]):
    """A method whose caller leaves out the connection; made by `reads` and `writes`."""

    def __init__(
        self, method: Callable[Concatenate[Any, Connection, P], R], *, writes: bool
    ) -> None:
        self.__doc__ = method.__doc__
        self._method = method
        self._writes = writes

    @overload
    def __get__(self, tables: Tables[Database], owner: object) -> Callable[P, R]: ...

    @overload
    def __get__(
        self, tables: Tables[AsyncDatabase], owner: object
    ) -> Callable[P, Coroutine[Any, Any, R]]: ...

    def __get__(self, tables: Tables[Any], owner: object) -> Callable[P, Any]:
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:  # noqa: ANN401
            def work(connection: Connection) -> R:
                return self._method(tables, connection, *args, **kwargs)

            database = tables._database
            return database.write(work) if self._writes else database.read(work)

        return call


def reads(method: Callable[Concatenate[Any, Connection, P], R]) -> _Method[P, R]:
    """Let a method see the same state of the database from its first read to its last.

    It raises StorageDamaged where the file can't be read or holds a value that nobody writes.
    """
    return _Method(method, writes=False)


def writes(method: Callable[Concatenate[Any, Connection, P], R]) -> _Method[P, R]:
    """Let a method write all of what it writes or nothing; see `Database.writing`."""
    return _Method(method, writes=True)
