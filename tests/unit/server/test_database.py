"""What an error of SQLite means for a person."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from fedrounds.errors import FederationError, OutOfSpace, StorageDamaged, StorageUnusable
from fedserver.store.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Give an empty database."""
    made = Database(tmp_path / "federation.sqlite")
    yield made
    made.close()


def error_of(code: int) -> sqlite3.Error:
    """Return the error that Python makes of a result code of SQLite's."""
    error = sqlite3.OperationalError("in SQLite's words")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (sqlite3.SQLITE_FULL, OutOfSpace),
        # A quota, and a limit on a file's size: the write fails, or the shared index can't grow.
        (sqlite3.SQLITE_IOERR_WRITE, OutOfSpace),
        (sqlite3.SQLITE_IOERR_SHMSIZE, OutOfSpace),
        (sqlite3.SQLITE_READONLY, StorageUnusable),
        (sqlite3.SQLITE_CANTOPEN, StorageUnusable),
        (sqlite3.SQLITE_PERM, StorageUnusable),
        (sqlite3.SQLITE_READONLY_DIRECTORY, StorageUnusable),
        (sqlite3.SQLITE_CORRUPT, StorageDamaged),
        (sqlite3.SQLITE_NOTADB, StorageDamaged),
        (sqlite3.SQLITE_IOERR_READ, StorageDamaged),
    ],
)
def test_an_error_of_the_file_is_named_whoever_runs_into_it(
    database: Database, code: int, meaning: type[FederationError]
) -> None:
    """Reading and writing name it alike, with what SQLite says."""

    def work(_: Connection) -> None:
        raise error_of(code)

    for run in (database.read, database.write):
        with pytest.raises(meaning, match="in SQLite's words") as caught:
            run(work)
        assert type(caught.value) is meaning


@pytest.mark.parametrize("code", [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_ERROR])
def test_an_error_of_the_software_stays_what_it_is(database: Database, code: int) -> None:
    """It isn't the disk's, and no person can mend it."""

    def work(_: Connection) -> None:
        raise error_of(code)

    with pytest.raises(sqlite3.OperationalError, match="in SQLite's words"):
        database.read(work)


def test_a_text_that_is_not_utf_8_is_damage(database: Database) -> None:
    """Nobody writes such a text."""

    def work(_: Connection) -> None:
        b"\xff".decode()

    with pytest.raises(StorageDamaged, match="utf-8"):
        database.read(work)


def test_a_damaged_page_is_found_by_the_examination(tmp_path: Path) -> None:
    """SQLite's own look at every page finds what no read of the service's has met."""
    path = tmp_path / "federation.sqlite"
    database = Database(path)
    database.examine()
    database.close()
    content = path.read_bytes()
    # The header of the last page, which belongs to a table or an index without rows.
    path.write_bytes(content[:-4096] + b"\xff" * 64 + content[-4032:])
    database = Database(path)
    with pytest.raises(StorageDamaged):
        database.examine()
    database.close()
