"""Tables made and upgraded by the migrations.

Import it where a database must be made or upgraded, not before: alembic takes 0.3 s to import.
"""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

from fedrounds.errors import StorageDamaged
from fedrounds.failpoints import FailPoint, failpoint
from fedrounds.files import naming_full_disk, sync_folder
from fedserver.store import schema
from fedserver.store.engine import open_engine, stored_revision

logger = logging.getLogger(__name__)


def make_tables(path: Path) -> None:
    """Make the tables of a new database in one transaction."""
    _migrate(path, keeps_copy=False)


def upgrade_in_place(path: Path) -> None:
    """Upgrade a database of an earlier version, after a copy of it is written beside it.

    Nobody else writes to the database meanwhile. It is one transaction: a process that is killed
    leaves the old version, or the new version.

    Raises:
        StorageDamaged: rows refer to rows that aren't there; nothing was changed.
    """
    _migrate(path, keeps_copy=True)


def upgraded_copy(path: Path, folder: Path) -> Path:
    """Write an upgraded copy of a database into `folder` and return its path."""
    copy = folder / path.name
    _copy(path, copy)
    _migrate(copy, keeps_copy=False)
    return copy


def _migrate(path: Path, *, keeps_copy: bool) -> None:
    """Bring a database of any known revision, or an empty database, to today's schema."""
    # Foreign keys would forbid the batch operations, which make a table anew and drop the old
    # table.
    engine = open_engine(path, read_only=False, checks_references=False)
    try:
        with engine.begin() as connection:
            before = stored_revision(connection)
            copy = path.with_name(f"{path.stem}.schema-{int(before or 0)}{path.suffix}")
            if keeps_copy:
                _copy(path, copy)
            _apply(connection, before)
            if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
                raise StorageDamaged(
                    f"{path} can't be upgraded: {len(broken)} rows refer to rows that aren't there "
                    f"(the first is in table {broken[0][0]}); nothing was changed: restore it from "
                    "a copy, or start with another --state-dir"
                )
            failpoint(FailPoint.UPGRADE_MADE)
    finally:
        engine.dispose()
    if keeps_copy:
        logger.info("upgraded %s; a copy of it as it was is in %s", path, copy)


def _apply(connection: Connection, before: str | None) -> None:
    """Run the migrations after the revision `before` in the connection's transaction."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "fedserver.store:migrations")
    if before == schema.FIRST_REVISION:
        # Written before there were migrations: alembic's table isn't there yet.
        command.stamp(config, before)
    command.upgrade(config, "head")


def _copy(source: Path, target: Path) -> None:
    """Copy a database, its write-ahead log included; `target` is whole or isn't there."""
    draft = target.with_name(target.name + ".draft")
    draft.unlink(missing_ok=True)
    with (
        naming_full_disk(target.parent),
        closing(sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True)) as reading,
        closing(sqlite3.connect(draft)) as writing,
    ):
        reading.backup(writing)
    # Bytes, then name, then folder: whoever sees the copy under its name has the whole of it, also
    # after a loss of power. The upgrade changes nothing before that.
    descriptor = os.open(draft, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    draft.replace(target)
    sync_folder(target.parent)
