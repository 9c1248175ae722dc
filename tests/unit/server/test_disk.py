"""Whether there is room for a round, and what is recorded of the server's own failures."""

import asyncio
import errno
import json
import logging
import shutil
from pathlib import Path

import pytest

from fedrounds.errors import OutOfFiles, OutOfSpace, StorageDamaged, StorageUnusable
from tests.server_run import ServerRun, serving


def test_a_disk_that_becomes_low_and_recovers_is_recorded_once_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By --min-free-bytes: above what is free, then below. The log says what to do."""

    async def note(server: ServerRun) -> None:
        free = shutil.disk_usage(tmp_path).free
        for min_free_bytes in (0, 2 * free, 2 * free, 0, 0):
            server.disk._min_free_bytes = min_free_bytes
            assert server.disk.is_low() == (min_free_bytes > 0)
            await server.disk.note_room()
        low, recovered = server.events
        assert (low.kind, low.is_incident) == ("disk-low", True)
        assert low.fields["min_free_bytes"] == 2 * free
        assert (recovered.kind, recovered.is_incident) == ("disk-recovered", False)

    with serving(tmp_path, min_clients=1) as server:
        asyncio.run(note(server))
    (warning,) = (
        record.getMessage() for record in caplog.records if "no round opens" in record.message
    )
    assert str(tmp_path) in warning
    assert "free some space, or start again with a smaller --min-free-bytes" in warning


@pytest.mark.parametrize(
    ("error", "kind", "level"),
    [
        (OutOfSpace("full"), "disk-full", logging.WARNING),
        (OutOfFiles("files"), "out-of-files", logging.WARNING),
        (OSError(errno.EIO, "input/output error"), "server-failed", logging.WARNING),
        (StorageUnusable("gone; put it back"), "server-failed", logging.ERROR),
        (RuntimeError("a defect"), "server-failed", logging.ERROR),
    ],
)
def test_a_failure_is_recorded_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, kind: str, level: int
) -> None:
    """Each kind of failure in each call; the log has a defect's traceback."""

    async def note(server: ServerRun) -> None:
        for call in ("PullWork", "PullWork", "Register"):
            await server.disk.note_failure(call, error)

    with serving(tmp_path, min_clients=1) as server:
        asyncio.run(note(server))
        assert server.kinds_of_events() == [kind] * (2 if kind == "server-failed" else 1)
        if kind == "server-failed":
            assert server.events[0].fields["what"] == "PullWork"
            assert str(error) in server.events[0].fields["reason"]
    assert {record.levelno for record in caplog.records} == {level}
    assert any(record.exc_info for record in caplog.records) == isinstance(error, RuntimeError)


def test_the_error_that_ends_the_server_is_recorded(tmp_path: Path) -> None:
    """However often it was noted before."""

    async def note(server: ServerRun) -> None:
        await server.disk.note_end("the round loop", StorageDamaged("torn"))
        await server.disk.note_end("the round loop", StorageDamaged("torn"))

    with serving(tmp_path, min_clients=1) as server:
        asyncio.run(note(server))
        assert server.kinds_of_events() == ["server-failed"] * 2
        assert server.events[0].fields["reason"] == "StorageDamaged: torn"


def test_what_could_not_be_recorded_is_recorded_with_the_next_event(tmp_path: Path) -> None:
    """With the time at which it was; listeners hear of each once, at once."""

    async def record(server: ServerRun) -> list[str]:
        table = "ALTER TABLE events RENAME TO {}"
        with server.store.database.writing() as connection:
            connection.exec_driver_sql(table.format("events_away"))
        await server.disk.note_end("first", StorageDamaged("torn"))
        with server.store.database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE events_away RENAME TO events")
        for what in ("second", "third"):
            await server.disk.note_end(what, StorageDamaged("torn"))
        with server.store.database.reading() as connection:
            rows = connection.exec_driver_sql("SELECT fields FROM events ORDER BY sequence")
            return [str(row.fields) for row in rows.all()]

    with serving(tmp_path, min_clients=1) as server:
        recorded = asyncio.run(record(server))
        assert [json.loads(fields)["what"] for fields in recorded] == ["first", "second", "third"]
        assert server.kinds_of_events() == ["server-failed"] * 3
