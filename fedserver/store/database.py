"""The file: opened, examined, and used in transactions whose errors have the service's names."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, create_engine, event, insert, inspect, select
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DatabaseError, NoResultFound

from fedserver.store import schema
from shared.errors import (
    FederationError,
    InvalidInput,
    NotFound,
    OutOfSpace,
    StorageDamaged,
    WrongSettings,
)

_BUSY_TIMEOUT_S = 30


def sqlite_engine(path: Path, *, read_only: bool) -> Engine:
    """Return an engine whose transactions take the write lock at once and survive power loss."""
    mode = "ro" if read_only else "rwc"
    engine = create_engine(
        URL.create(
            "sqlite",
            # A URI, in which # ? and % of a folder's name would have a meaning of their own.
            database=f"file:{quote(str(path))}",
            query={"mode": mode, "uri": "true"},
        ),
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def set_durability(connection: sqlite3.Connection, _: object) -> None:
        # The driver's own transaction control begins too late (at the first write).
        connection.isolation_level = None
        if read_only:
            # A text with a flipped bit is to be shown, not to be in the way of all the others.
            connection.text_factory = _readable
        else:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def examine_version(engine: Engine, path: Path, *, read_only: bool) -> None:
    """Examine the version that an old database is stamped with; make the tables of a new one.

    Raises:
        NotFound: `read_only`, and the database has no tables yet.
        WrongSettings: another version of this software made the database; nothing was changed.
        StorageDamaged: it has no version.
    """
    with engine.begin() as connection:
        if inspect(connection).has_table("about"):
            version = connection.execute(select(schema.about.c.schema_version)).scalar_one()
        elif read_only:
            raise NotFound(f"{path} holds no run yet")
        else:
            version = schema.SCHEMA_VERSION
            schema.metadata.create_all(connection)
            connection.execute(insert(schema.about).values(schema_version=version))
        if not isinstance(version, int):
            raise _damaged(path, f"its schema has the version {version!r}")
        if version < schema.SCHEMA_VERSION:
            raise WrongSettings(
                f"{path} was made by an older version of this software (schema {version}, this one "
                f"writes {schema.SCHEMA_VERSION}); look at it with that version, or begin in "
                "another --state-dir"
            )
        if version > schema.SCHEMA_VERSION:
            raise WrongSettings(
                f"{path} was made by a newer version of this software (schema {version}, "
                f"this one knows {schema.SCHEMA_VERSION}); update the software"
            )


class Database:
    """One database file, and the way in and out of it."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        if read_only and not path.exists():
            raise NotFound(f"there is no run in {path.parent}; check --state-dir")
        self._path = path
        self._engine = sqlite_engine(path, read_only=read_only)
        with self._errors_named():
            examine_version(self._engine, path, read_only=read_only)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def examine(self) -> None:
        """Let the database look at every page of itself.

        Raises:
            StorageDamaged: it found something.
        """
        with self.reading() as connection:
            found = connection.exec_driver_sql("PRAGMA integrity_check(3)").scalars().all()
        if found != ["ok"]:
            raise _damaged(self._path, "; ".join(found))

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
            OutOfSpace: the disk is full; nothing was written.
            StorageDamaged: the file can't be read or written.
        """
        with self._errors_named(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            raise _named(self._path, error) from error
        except UnicodeDecodeError as error:
            raise _damaged(self._path, str(error)) from error


def _readable(text: bytes) -> str:
    return text.decode(errors="replace")


def _named(path: Path, error: DatabaseError) -> FederationError | DatabaseError:
    """Return what a database's error means for a person; itself where it is the software's."""
    extended = getattr(error.orig, "sqlite_errorcode", 0)
    code = extended & 0xFF
    # A quota and a limit on a file's size come as failed writes.
    if code == sqlite3.SQLITE_FULL or extended == sqlite3.SQLITE_IOERR_WRITE:
        return OutOfSpace(
            f"no room to write in {path.parent} ({error.orig}); free some space: "
            "nothing acknowledged is lost"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return InvalidInput(
            f"{path} can't be opened by this user ({error.orig}); run this as the server's user, "
            f"or copy the folder {path.parent} and look at the copy"
        )
    is_damaged = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR)
    # All tables and columns asked for were made with the database.
    if is_damaged or str(error.orig).startswith(("no such table", "no such column")):
        return _damaged(path, str(error.orig))
    return error


def _damaged(path: Path, found: str) -> StorageDamaged:
    return StorageDamaged(
        f"{path} can't be read as this service's database ({found}); nothing was changed: restore "
        "it from a copy, or start with another --state-dir"
    )
