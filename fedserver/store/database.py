"""The database: examined, upgraded, used in transactions whose errors have the service's names."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DatabaseError, NoResultFound

from fedrounds.errors import (
    FederationError,
    NotFound,
    StorageDamaged,
    StorageUnusable,
    WrongSettings,
)
from fedrounds.files import out_of_files, out_of_space
from fedserver.records import Event
from fedserver.runtime import Threads
from fedserver.store import schema
from fedserver.store.engine import BUSY_TIMEOUT_S, open_engine, stored_revision

R = TypeVar("R")

RECORDED = "recorded"
"""Where a connection's `info` holds the list of the events that its transaction records."""

_SHORT_LOG_BYTES = 1 << 20


class Database:
    """One database file, and the way in and out of it.

    A file that isn't there is made, unless it is opened `read_only`. A database of an earlier
    version is upgraded in place with `upgrades`, which only the holder of the state-dir's lock may
    ask for; without it, what is read is an upgraded copy in the temporary folder.
    """

    def __init__(self, path: Path, *, read_only: bool = False, upgrades: bool = False) -> None:
        if read_only and not path.exists():
            raise NotFound(f"there is no run in {path.parent}; check --state-dir")
        self._path = path
        self._recorded: list[Event] = []
        self._copy: TemporaryDirectory[str] | None = None
        self._engine = open_engine(path, read_only=read_only)
        with self._errors_named():
            revision = self._examine_revision()
            if revision == schema.REVISION:
                return
            if revision is None and read_only:
                raise NotFound(f"{path} holds no run yet")
            if revision is not None and not (read_only or upgrades):
                raise WrongSettings(
                    f"{path} was made by an earlier version of this software (schema "
                    f"{int(revision)}, this one has {int(schema.REVISION)}) and isn't upgraded "
                    "yet: start the server with this --state-dir, which upgrades it, then try again"
                )
            from fedserver.store import upgrades as migrations  # noqa: PLC0415

            if revision is None:
                migrations.make_tables(path)
            elif upgrades:
                migrations.upgrade_in_place(path)
            else:
                self._copy = TemporaryDirectory(prefix="fedserver-")
                copy = migrations.upgraded_copy(path, Path(self._copy.name))
                self._engine.dispose()
                self._engine = open_engine(copy, read_only=True)

    def _examine_revision(self) -> str | None:
        """Return the revision of the database's schema; None without tables.

        Raises:
            WrongSettings: this software can't use the database.
            StorageDamaged: it has a version that nobody writes.
        """
        with self._engine.begin() as connection:
            try:
                revision = stored_revision(connection)
            except (ValueError, NoResultFound) as error:
                raise _damaged(self._path, str(error)) from error
        if revision is not None and int(revision) < int(schema.FIRST_REVISION):
            raise WrongSettings(
                f"{self._path} was made by an older version of this software (schema "
                f"{int(revision)}; this one upgrades from {int(schema.FIRST_REVISION)} on); look "
                "at it with that version, or begin in another --state-dir"
            )
        if revision is not None and int(revision) > int(schema.REVISION):
            raise WrongSettings(
                f"{self._path} was made by a newer version of this software (schema "
                f"{int(revision)}, this one knows {int(schema.REVISION)}); update the software"
            )
        return revision

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()
        if self._copy is not None:
            self._copy.cleanup()

    def examine(self) -> None:
        """Let the database look at every page of itself.

        Raises:
            StorageDamaged: SQLite found damage.
        """
        with self.reading() as connection:
            findings = connection.exec_driver_sql("PRAGMA integrity_check(3)").scalars().all()
        if findings != ["ok"]:
            raise _damaged(self._path, "; ".join(findings))

    def shorten_log(self) -> bool:
        """Empty the write-ahead log if it is large; return whether it is short afterwards.

        SQLite writes over it from the start only when nobody reads, and never makes it shorter by
        itself: beside readers that come and go it would grow for ever. While a reader is at work
        this changes nothing, and waits for nobody; the next call tries again.
        """
        log = self._path.with_name(self._path.name + "-wal")
        if not log.exists() or log.stat().st_size <= _SHORT_LOG_BYTES:
            return True
        with self._errors_named():
            pooled = self._engine.raw_connection()
            try:
                cursor = pooled.cursor()
                cursor.execute("PRAGMA busy_timeout = 0")
                try:
                    cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    answer = cursor.fetchone()
                finally:
                    cursor.execute(f"PRAGMA busy_timeout = {1000 * BUSY_TIMEOUT_S}")
            finally:
                pooled.close()
        # Its first number says whether somebody was in the way.
        assert answer is not None
        return not answer[0]

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection that sees one state of the database from first read to last.

        Raises:
            StorageDamaged: the file can't be read, or holds what nobody writes.
        """
        try:
            with self._errors_named(), self._engine.begin() as connection:
                yield connection
        except (ValueError, NoResultFound) as error:
            # A column that isn't JSON any more, a state there isn't, a row that others name.
            raise _damaged(self._path, str(error)) from error

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Give the connection of one transaction; it is durable when the block has ended.

        Raises:
            OutOfSpace: the disk is full, or no further file can be opened; nothing was written.
            StorageDamaged: the file can't be read or written.
        """
        recorded: list[Event] = []
        with self._errors_named():
            with self._engine.begin() as connection:
                connection.info[RECORDED] = recorded
                yield connection
            # After the commit: an event is published only if its transaction is durable.
            self._recorded += recorded

    def read(self, work: Callable[[Connection], R]) -> R:
        """Return the result of `work`, which reads in a transaction; see `reading`."""
        with self.reading() as connection:
            return work(connection)

    def write(self, work: Callable[[Connection], R]) -> R:
        """Return the result of `work` once all that it wrote is durable; see `writing`."""
        with self.writing() as connection:
            return work(connection)

    def take_recorded(self) -> list[Event]:
        """Return the events recorded since the last call, in order; what was rolled back isn't."""
        taken, self._recorded = self._recorded, []
        return taken

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            named = isinstance(error.orig, sqlite3.Error) and _named(self._path, error.orig)
            raise named or error from error
        except sqlite3.Error as error:
            raise _named(self._path, error) or error from error
        except UnicodeDecodeError as error:
            raise _damaged(self._path, str(error)) from error


class AsyncDatabase:
    """Runs a database's transactions on a thread of its own, one after another in order.

    A call returns when what it wrote is durable and the events that it recorded are published: no
    listener hears of an event that a loss of power could undo.
    """

    def __init__(
        self, database: Database, *, threads: Threads, publish: Callable[[Event], None]
    ) -> None:
        self._database = database
        self._threads = threads
        self._publish = publish

    async def read(self, work: Callable[[Connection], R]) -> R:
        """Return the result of `work`, which reads; see `Database.read`."""
        return await self._threads.in_store(self._database.read, work)

    async def write(self, work: Callable[[Connection], R], *, publishes: bool = True) -> R:
        """Return the result of `work`, its events published if so wanted; see `Database.write`."""

        def write() -> tuple[R, list[Event]]:
            # On the database's thread: the next transaction's events aren't among them.
            return self._database.write(work), self._database.take_recorded()

        result, recorded = await self._threads.in_store(write)
        for event in recorded if publishes else ():
            self._publish(event)
        return result

    async def shorten_log(self) -> bool:
        """Empty a large write-ahead log; see `Database.shorten_log`."""
        return await self._threads.in_store(self._database.shorten_log)


_FULL = {
    # A quota and a limit on a file's size come as failed writes, also of the index that processes
    # share.
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
}


def _named(path: Path, error: sqlite3.Error) -> FederationError | None:
    """Return a database's error as this project's; None where the software is at fault."""
    extended = getattr(error, "sqlite_errorcode", 0)
    code = extended & 0xFF
    if code == sqlite3.SQLITE_FULL or extended in _FULL:
        return out_of_space(path.parent, str(error))
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR) and (used_up := out_of_files()):
        return used_up
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StorageUnusable(
            f"{path} can't be opened by this user ({error}); run this as the server's user, "
            f"or copy the folder {path.parent} and look at the copy"
        )
    is_damaged = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR)
    # All tables and columns asked for were made with the database, and its texts are UTF-8.
    words = ("no such table", "no such column", "Could not decode to UTF-8")
    if is_damaged or str(error).startswith(words):
        return _damaged(path, str(error))
    return None


def _damaged(path: Path, finding: str) -> StorageDamaged:
    return StorageDamaged(
        f"{path} can't be read as this service's database ({finding}); nothing was changed: "
        "restore it from a copy, or start with another --state-dir"
    )
