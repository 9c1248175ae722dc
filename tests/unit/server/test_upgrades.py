"""Upgrades of the database: the migrations make today's schema, and nothing is lost on the way."""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect

from fedrounds.errors import StorageDamaged, WrongSettings
from fedrounds.failpoints import VARIABLE, FailPoint
from fedserver.__main__ import main
from fedserver.store import Store, read_history, schema
from tests.earlier_state import FINISHED, UNFINISHED, unpack_earlier_state

COPY = "federation.schema-6.sqlite"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Give the server's state-dir that an earlier version left behind."""
    unpack_earlier_state(tmp_path)
    return tmp_path / "server"


def tables_of(engine: Engine) -> dict[str, Any]:
    """Return all that makes a table that table, by name; alembic's own left out."""
    inspector = inspect(engine)
    tables = {
        name: {
            "columns": [
                {key: str(value) for key, value in column.items()}
                for column in inspector.get_columns(name)
            ],
            "primary key": inspector.get_pk_constraint(name)["constrained_columns"],
            "foreign keys": sorted(
                str((key["constrained_columns"], key["referred_table"], key["referred_columns"]))
                for key in inspector.get_foreign_keys(name)
            ),
            "unique": sorted(
                str(constraint["column_names"])
                for constraint in inspector.get_unique_constraints(name)
            ),
            "indexes": sorted(str(index) for index in inspector.get_indexes(name)),
        }
        for name in inspector.get_table_names()
        if name != "alembic_version"
    }
    engine.dispose()
    return tables


def tables_in(path: Path) -> dict[str, Any]:
    """Return the tables of a database file."""
    return tables_of(create_engine(f"sqlite:///{path}"))


def tables_of_schema() -> dict[str, Any]:
    """Return the tables that schema.py declares."""
    engine = create_engine("sqlite://")
    schema.metadata.create_all(engine)
    return tables_of(engine)


def rows_of(path: Path, query: str) -> list[Any]:
    """Return what a query finds in a database, read past the software."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_the_migrations_make_the_tables_that_the_schema_declares(tmp_path: Path) -> None:
    """A new database is made by the migrations; schema.py is what the queries are written for."""
    Store(tmp_path / "federation.sqlite").close()
    assert tables_in(tmp_path / "federation.sqlite") == tables_of_schema()


def test_the_newest_migration_is_the_schemas_revision() -> None:
    """The number that is compared without alembic is alembic's own; there is one line of them."""
    config = Config()
    config.set_main_option("script_location", "fedserver.store:migrations")
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [schema.REVISION]
    assert scripts.get_bases() == [schema.FIRST_REVISION]


def test_an_earlier_database_is_upgraded_in_place_and_a_copy_is_kept(
    earlier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tables are today's, the rows are those of before; the log names the copy."""
    path, copy = earlier / "federation.sqlite", earlier / COPY
    reader = Store(path, read_only=True)
    before = [read_history(reader, run) for run in reader.runs.all_runs()]
    reader.close()
    with caplog.at_level(logging.INFO):
        store = Store(path, upgrades=True)
    assert f"upgraded {path}; a copy of it as it was is in {copy}" in caplog.text
    assert [read_history(store, run) for run in store.runs.all_runs()] == before
    store.database.examine()
    store.close()
    assert tables_in(path) == tables_of_schema()
    assert rows_of(copy, "SELECT schema_version FROM about") == [(6,)]
    assert rows_of(copy, "SELECT count(*) FROM rounds") == [(5,)]

    caplog.clear()
    copied_at = copy.stat().st_mtime_ns
    Store(path, upgrades=True).close()
    assert "upgraded" not in caplog.text
    assert copy.stat().st_mtime_ns == copied_at


def test_software_without_migrations_refuses_an_upgraded_database(earlier: Path) -> None:
    """It compares the number in `about` with its own, 6, and says that a newer version is there."""
    Store(earlier / "federation.sqlite", upgrades=True).close()
    assert rows_of(earlier / "federation.sqlite", "SELECT schema_version FROM about") == [(7,)]


@pytest.mark.parametrize("run", [FINISHED, UNFINISHED])
def test_looking_at_an_earlier_database_changes_nothing(
    earlier: Path, run: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands that only read answer from an upgraded copy, and leave none behind."""
    path = earlier / "federation.sqlite"
    content, names = path.read_bytes(), sorted(path.name for path in earlier.iterdir())
    for command in ("history", "show"):
        code = main([command, "--state-dir", str(earlier), "--run", str(run)])
        assert code == 0, capsys.readouterr().err
        assert f"run{run}-" in capsys.readouterr().out
    assert path.read_bytes() == content
    assert sorted(path.name for path in earlier.iterdir()) == names


def test_a_copy_that_was_read_is_gone_afterwards(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database may be large: what it takes in the temporary folder ends with the command."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    store = Store(earlier / "federation.sqlite", read_only=True)
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    store.close()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_command_that_writes_does_not_upgrade(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server of the earlier version may be running: only who holds the lock upgrades."""
    with pytest.raises(WrongSettings, match="start the server with this --state-dir"):
        Store(earlier / "federation.sqlite")
    assert main(["quarantine", "drop", "--order", "any", "--state-dir", str(earlier)]) == 1
    assert "schema 6" in capsys.readouterr().err
    assert not (earlier / COPY).exists()


def test_a_kill_in_the_middle_of_an_upgrade_leaves_the_earlier_database(earlier: Path) -> None:
    """Killed before its transaction is committed; the next start upgrades."""
    path = earlier / "federation.sqlite"
    upgrading = [
        *(sys.executable, "-c"),
        "import sys; from pathlib import Path; from fedserver.store import Store\n"
        "Store(Path(sys.argv[1]), upgrades=True)",
        str(path),
    ]
    killed = subprocess.run(
        upgrading, env={**os.environ, VARIABLE: f"{FailPoint.UPGRADE_MADE}:kill"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert rows_of(path, "SELECT schema_version FROM about") == [(6,)]
    assert "alembic_version" not in tables_in(path)
    assert tables_in(path) == tables_in(earlier / COPY)
    subprocess.run(upgrading, check=True)
    assert tables_in(path) == tables_of_schema()
    assert rows_of(earlier / COPY, "SELECT schema_version FROM about") == [(6,)]


def test_a_database_with_rows_that_refer_to_nothing_is_not_upgraded(earlier: Path) -> None:
    """Foreign keys are off while tables are made anew, so they are examined at the end."""
    path = earlier / "federation.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE orders SET run_id = 'nobody'")
        connection.commit()
    with pytest.raises(StorageDamaged, match="refer to rows that aren't there"):
        Store(path, upgrades=True)
    assert rows_of(path, "SELECT schema_version FROM about") == [(6,)]
