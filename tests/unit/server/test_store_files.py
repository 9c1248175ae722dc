"""The store's file: made anew, opened again, refused, and never changed by a refusal."""

import os
import resource
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedrounds.errors import (
    NotFound,
    OutOfSpace,
    StorageDamaged,
    StorageUnusable,
    WrongSettings,
)
from fedserver.__main__ import main
from fedserver.phases import OrderState
from fedserver.store import Store, read_history, schema
from tests.factories import begin_round, make_event, make_update, record_arrival

NOBODY = 65534
"""A user's number that owns no files."""


@pytest.mark.parametrize(
    "name", ["plain", "a b", "a#b", "a?b", "100%", "a%41b", "a&b=c", "b\u00e4r"]
)
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Signs that mean something in a URI don't lead the database elsewhere."""
    folder = tmp_path / name
    folder.mkdir()
    store = Store(folder / "federation.sqlite")
    run, _ = begin_round(store)
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (folder / "federation.sqlite").is_file()
    reader = Store(folder / "federation.sqlite", read_only=True)
    assert reader.runs.latest_run() == run
    reader.close()


def test_everything_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    """What was written is read by another store of the same file, also beside the first."""
    path = tmp_path / "federation.sqlite"
    writer = Store(path)
    run, opened = begin_round(writer)
    update = make_update(opened.orders[0].order_id)
    record_arrival(writer, run, update)
    for store in (Store(path), Store(path, read_only=True)):
        assert store.runs.latest_run() == run
        assert store.runs.latest_run(number=2) is None
        latest = store.rounds.latest_attempt(run.run_id)
        assert latest is not None
        assert [order.state for order in latest.orders] == [OrderState.STORED, OrderState.OPEN]
        assert [stored.update for stored in store.orders.stored_updates(opened)] == [update]
        assert len(read_history(store, run)) == 1
        store.close()
    writer.close()


def test_what_is_written_survives_a_loss_of_power(tmp_path: Path) -> None:
    """SQLite's settings: write-ahead log, and every commit synced (synchronous = FULL, 2)."""
    store = Store(tmp_path / "federation.sqlite")
    with store.database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
    store.close()


@pytest.mark.parametrize(
    "content", [b"no database at all\n" * 300, b"SQLite format 3\0" + b"x" * 5000]
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_is_no_database_is_damage_and_stays_as_it_is(
    tmp_path: Path, content: bytes, read_only: bool
) -> None:
    """The message names the file and the ways out; nothing is written or deleted."""
    path = tmp_path / "federation.sqlite"
    path.write_bytes(content)
    with pytest.raises(StorageDamaged, match=r"federation\.sqlite can't be read.*--state-dir"):
        Store(path, read_only=read_only)
    assert path.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["federation.sqlite"]


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("upgrades", [False, True])
@pytest.mark.parametrize(
    ("version", "way_out"), [(int(schema.REVISION) + 1, "update the software"), (5, "that version")]
)
def test_a_database_of_an_unknown_version_is_refused_untouched(
    tmp_path: Path, read_only: bool, upgrades: bool, version: int, way_out: str
) -> None:
    """The software neither reads nor mends what it doesn't know."""
    path = tmp_path / "federation.sqlite"
    connection = sqlite3.connect(path)
    if version > int(schema.FIRST_REVISION):
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (f"{version:04}",))
    else:
        connection.execute("CREATE TABLE about (schema_version INTEGER NOT NULL)")
        connection.execute("INSERT INTO about VALUES (?)", (version,))
    connection.commit()
    before = list(connection.iterdump())
    connection.close()
    with pytest.raises(WrongSettings, match=rf"schema {version}\b.*{way_out}"):
        Store(path, read_only=read_only, upgrades=upgrades)
    connection = sqlite3.connect(path)
    assert list(connection.iterdump()) == before
    connection.close()
    assert [path.name for path in tmp_path.glob("*schema*")] == []


def test_looking_at_nothing_finds_nothing_and_makes_nothing(tmp_path: Path) -> None:
    """Read-only, a missing or empty database is NotFound, and no file comes into being."""
    with pytest.raises(NotFound, match="check --state-dir"):
        Store(tmp_path / "federation.sqlite", read_only=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "federation.sqlite").touch()
    with pytest.raises(NotFound, match="no run yet"):
        Store(tmp_path / "federation.sqlite", read_only=True)
    assert (tmp_path / "federation.sqlite").stat().st_size == 0


@contextmanager
def as_somebody_else(folder: Path, *, mode: int) -> Iterator[None]:
    """Make folders and files read-only in a process to which their mode applies."""
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(mode)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_database_of_another_user_is_refused_with_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SQLite writes beside it even to read it; into some folders one can't even look."""
    # Not in a folder of pytest's: nobody else may look into those.
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "federation.sqlite"
        look = ["history", "--state-dir", name]
        # Imports what it needs: afterwards this process may not be able to.
        assert main(look) == 1
        store = Store(path)
        begin_round(store)
        store.close()
        with as_somebody_else(path.parent, mode=0o555):
            for read_only in (True, False):
                with pytest.raises(
                    StorageUnusable, match=r"by this user .* server's user, or copy"
                ):
                    Store(path, read_only=read_only).runs.latest_run()
        for mode in (0o555, 0o000):
            capsys.readouterr()
            with as_somebody_else(path.parent, mode=mode):
                assert main(look) == 1
            assert "run this as the server's user, or copy the" in capsys.readouterr().err
        assert main(look) == 0


def test_looking_at_the_quarantine_makes_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing was ever held there is none, and it isn't for a reader to make it."""
    store = Store(tmp_path / "federation.sqlite")
    begin_round(store)
    store.close()
    assert main(["quarantine", "list", "--state-dir", str(tmp_path)]) == 0
    assert "nothing was refused" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_runs_are_numbered_one_after_the_other(tmp_path: Path) -> None:
    """Each run has its own id and number; the latest is the last begun."""
    store = Store(tmp_path / "federation.sqlite")
    assert store.runs.latest_run() is None
    first, second = store.runs.begin_run({"lr": 0.1}), store.runs.begin_run({"lr": 0.2})
    assert (first.number, second.number) == (1, 2)
    assert first.run_id != second.run_id
    assert store.runs.latest_run() == second
    assert store.runs.latest_run(number=1) == first
    assert store.rounds.latest_attempt(second.run_id) is None
    store.close()


def write_much(store: Store, run_id: str) -> None:
    """Write more than a log may be long: 8 MB of events."""
    event = replace(make_event(), fields={"text": "x" * 1_000_000})
    for _ in range(8):
        store.events.add_events(run_id, [event])


def test_the_log_is_emptied_beside_open_readers(tmp_path: Path) -> None:
    """Whoever has read and keeps the database open doesn't let it grow for ever."""
    path, log = tmp_path / "federation.sqlite", tmp_path / "federation.sqlite-wal"
    writer = Store(path)
    run = writer.runs.begin_run({})
    reader = Store(path, read_only=True)
    assert reader.runs.latest_run() == run
    write_much(writer, run.run_id)
    assert log.stat().st_size > 2_000_000
    assert writer.database.shorten_log()
    assert log.stat().st_size == 0
    assert reader.runs.latest_run() == run
    reader.close()
    writer.close()


def test_a_reader_at_work_keeps_the_log_until_it_is_done(tmp_path: Path) -> None:
    """It still sees the state it began with; nobody waits for it, and the next call succeeds."""
    path, log = tmp_path / "federation.sqlite", tmp_path / "federation.sqlite-wal"
    writer = Store(path)
    run = writer.runs.begin_run({})
    reader = Store(path, read_only=True)
    count = "SELECT count(*) FROM events"
    with reader.database.reading() as connection:
        assert connection.exec_driver_sql(count).scalar_one() == 0
        write_much(writer, run.run_id)
        assert not writer.database.shorten_log()
        assert log.stat().st_size > 8_000_000
        assert connection.exec_driver_sql(count).scalar_one() == 0
    assert writer.database.shorten_log()
    assert log.stat().st_size == 0
    with reader.database.reading() as connection:
        assert connection.exec_driver_sql(count).scalar_one() == 8
    reader.close()
    writer.close()


def test_a_first_start_without_room_is_no_damaged_database(tmp_path: Path) -> None:
    """A limit of one page on the size of files stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutOfSpace, match=r"no room to write in .*; free some space"):
            Store(tmp_path / "federation.sqlite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    """Names of files are bytes."""
    folder = tmp_path / os.fsdecode(b"st\xe4")
    folder.mkdir()
    Store(folder / "federation.sqlite").close()
    assert (folder / "federation.sqlite").is_file()
