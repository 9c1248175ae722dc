"""The database file: how it is opened, and which revision of the schema it has."""

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, create_engine, event, inspect, select, text
from sqlalchemy.engine import Engine

from fedserver.store import schema

BUSY_TIMEOUT_S = 30


def open_engine(path: Path, *, read_only: bool, checks_references: bool = True) -> Engine:
    """Return an engine whose transactions take the write lock at once and survive power loss."""
    mode = "ro" if read_only else "rwc"
    engine = create_engine(
        URL.create(
            "sqlite",
            # A URI, in which # ? and % of a folder's name would have a meaning of their own.
            database=f"file:{quote(os.fsencode(path))}",
            query={"mode": mode, "uri": "true"},
        ),
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def set_durability(connection: sqlite3.Connection, _: object) -> None:
        # The driver's own transaction control begins too late (at the first write).
        connection.isolation_level = None
        if read_only:
            # A text with a flipped bit is to be shown, not to be in the way of all the others.
            connection.text_factory = _readable
        else:
            # FULL syncs the write-ahead log at each commit, before the call returns: receipts rest
            # on it. NORMAL, which many use beside WAL, would lose the last commits with the power.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA foreign_keys = {'ON' if checks_references else 'OFF'}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def stored_revision(connection: Connection) -> str | None:
    """Return the revision of the schema that a database has, as four digits; None without tables.

    Raises:
        ValueError: it has a version that nobody writes.
    """
    tables = inspect(connection)
    if tables.has_table("alembic_version"):
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    elif tables.has_table(schema.about.name):
        version = connection.execute(select(schema.about.c.schema_version)).scalar_one()
    else:
        return None
    if not str(version).isdecimal():
        raise ValueError(f"its schema has the version {version!r}")
    return f"{int(version):04}"


def _readable(text: bytes) -> str:
    return text.decode(errors="replace")
