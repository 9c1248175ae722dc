"""Which run a server serves when it starts."""

import logging
from pathlib import Path

import pytest

from fedserver.records import RunState
from fedserver.server import _open_run
from fedserver.settings import ServerSettings
from fedserver.store import Store


def test_a_run_without_a_round_fails_if_the_settings_change_and_the_log_says_so_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: the event isn't left over for whoever listens to the store later."""
    caplog.set_level(logging.INFO, logger="fedserver")
    store = Store(tmp_path / "federation.sqlite")
    try:
        begun = _open_run(store, ServerSettings(rounds=3))
        assert _open_run(store, ServerSettings(rounds=3)) == begun
        caplog.clear()
        run = _open_run(store, ServerSettings(rounds=4))
        assert run.run_id != begun.run_id
        assert run.state is RunState.OPEN
        assert caplog.messages == [
            "run-failed reason='no round had begun when the server was started again with other "
            "settings'"
        ]
        assert store.database.take_recorded() == []
    finally:
        store.close()
