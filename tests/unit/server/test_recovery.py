"""After a restart or an absence: what is recorded, and which files are whole."""

import asyncio
from pathlib import Path

from fedserver.housekeeping.recovery import (
    damaged_updates,
    note_absence,
    note_restart,
    salvageable,
)
from tests.server_run import ServerRun, serving


def test_only_a_run_that_had_begun_was_interrupted(tmp_path: Path) -> None:
    """Neither a restart nor an absence before its first round is an incident."""

    async def note(server: ServerRun) -> None:
        await note_restart(server.recording, server.run.run_id)
        await note_absence(12.5, open_orders=server.open_orders, disk=server.disk)
        assert server.kinds_of_events() == []
        await server.begin(0)
        server.events.clear()
        await note_restart(server.recording, server.run.run_id)
        await note_absence(12.5, open_orders=server.open_orders, disk=server.disk)
        restarted, away = server.events
        assert (restarted.kind, restarted.round_number) == ("server-restarted", 1)
        assert (away.kind, away.fields) == ("server-away", {"away_s": 12.5})

    with serving(tmp_path, min_clients=1) as server:
        asyncio.run(note(server))


def test_an_acknowledged_update_is_whole_gone_or_damaged(tmp_path: Path) -> None:
    """Each that isn't whole is named with its client and path."""

    async def store(server: ServerRun) -> None:
        await server.begin(0, 1, 2)
        for client_id in (0, 1, 2):
            await server.answer(client_id)

    with serving(tmp_path, min_clients=3) as server:
        asyncio.run(store(server))
        stored = server.store.orders.stored_updates(server.latest())
        assert damaged_updates(server.spool, stored) == []
        paths = [
            server.spool.path(stored_update.update.order_id, stored_update.update.digest)
            for stored_update in stored
        ]
        paths[1].unlink()
        paths[2].write_bytes(b"other")
        assert damaged_updates(server.spool, stored) == [
            f"the update of client 1 is gone ({paths[1]})",
            f"the update of client 2 holds other bytes ({paths[2]})",
        ]


def test_a_database_that_is_lost_leaves_models_that_can_be_used(tmp_path: Path) -> None:
    """The newest of those whose content is their name."""
    models = tmp_path / "models"
    assert salvageable(models) == f"no whole global model is in {models}"
    with serving(tmp_path, min_clients=1) as server:
        _, base = asyncio.run(server.begin(0))
    (models / f"{'0' * 64}.safetensors").write_bytes(b"torn")
    text = salvageable(models)
    assert text.startswith(f"1 of 2 global models in {models} are whole; the newest of them is ")
    assert f"{base.digest}.safetensors" in text
